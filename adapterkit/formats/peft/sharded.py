"""PEFT LoRA in the sharded checkpoints of a training run: torch's (DCP) and DeepSpeed's (ZeRO).

They hold the tensors of a live model, or of its adapter, under the names of memory. What scales the
update lies in no tensor: it is in adapter_config.json beside or above, or given as alpha.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.beside import lying_beside
from adapterkit.containers.dcp import Trail, is_of_optimizer, read_dcp
from adapterkit.containers.folders import DATA_SUFFIX, INDEX, dcp_folder, step_folder
from adapterkit.containers.zero import read_zero
from adapterkit.errors import FormatError, NotFoundError, UnsupportedError, UsageError
from adapterkit.formats.peft.config import LoraConfig
from adapterkit.formats.peft.files import CONFIG
from adapterkit.formats.peft.reader import interpret
from adapterkit.formats.peft.sharded_files import config_above
from adapterkit.json_file import read_json_object
from adapterkit.notes import Provenance
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from adapterkit.formats.protocol import Options
    from adapterkit.model import AdapterTensorSet

_FACTOR = re.compile(
    r"\.(?:lora_[AB](?:\.[^.]+)?\.weight|lora_embedding_[AB](?:\.(?!exp_avg|step)[^.]+)?)$"
)
_A = re.compile(r"\.lora_A(?:\.[^.]+)?\.weight$|\.lora_embedding_A(?:\.[^.]+)?$")
_SAVED = re.compile(r"(?:^|\.)(?P<name>[^.]+)\.modules_to_save\.")
_MEGATRON = re.compile(r"\.adapter(?:\.adapter_[a-z]+)?\.linear_in\.weight$")
_MOST_SHOWN = 3


@dataclass(frozen=True, slots=True)
class _State:
    """What a checkpoint holds of an adapter.

    Attributes:
        folder: the directory of its files.
        what: what the checkpoint is, for messages.
        tensors: by PEFT's names of memory.
        notes: what was left out.
    """

    folder: Path
    what: str
    tensors: Mapping[str, LazyTensor]
    notes: tuple[str, ...]


def read_dcp_adapter(path: Path, options: Options) -> AdapterTensorSet:
    """Read the adapter of a checkpoint of torch; its tensors are joined when they are asked for.

    Args:
        path: the directory, one above it, or a file of it.
        options: `alpha` is the scale numerator where no adapter_config.json lies beside.

    Raises:
        NotFoundError: if a file of a rank is missing.
        FormatError: if a file is malformed, or there is no LoRA in the checkpoint.
        UnsupportedError: if the checkpoint is parted in a way that is not joined.
        UsageError: if alpha is not known, or given and another one in the config.
    """
    return _adapter(_dcp_state(path), "dcp", path, options)


def read_deepspeed_adapter(path: Path, options: Options) -> AdapterTensorSet:
    """Read the adapter of a checkpoint of DeepSpeed; in all else as `read_dcp_adapter`."""
    return _adapter(_zero_state(path), "deepspeed", path, options)


def _adapter(state: _State, name: str, path: Path, options: Options) -> AdapterTensorSet:
    if not any(_FACTOR.search(f".{name}") for name in state.tensors):
        if any(_MEGATRON.search(name) for name in state.tensors):
            raise UsageError(
                f"is {state.what} of Megatron's LoRA, whose layers divide by the sizes of the base "
                "model; read it with --dialect megatron --alpha ALPHA --base BASE",
                path=state.folder,
            )
        shown = ", ".join(list(state.tensors)[:_MOST_SHOWN])
        raise FormatError(
            f"is {state.what} of {len(state.tensors)} trained tensors ({shown}...), and none "
            "is a factor of PEFT's LoRA; of a model that was trained whole, save the weights "
            "and find the update with: adapterkit extract --base BASE --tuned MODEL -o ADAPTER",
            path=state.folder,
        )
    config_path = config_above(state.folder)
    if config_path:
        return _with_config(state, config_path, name, path, options)
    return _with_alpha(state, name, path, options)


def _with_config(
    state: _State, config_path: Path, name: str, path: Path, options: Options
) -> AdapterTensorSet:
    config = LoraConfig(read_json_object(config_path), config_path)
    if options.alpha is not None and options.alpha != config.alpha:
        raise UsageError(
            f"alpha is {config.alpha:g} in {config_path}, --alpha is {options.alpha:g}; "
            "leave it out",
            path=path,
        )
    adapter = interpret(state.tensors, config, state.folder, options.base)
    scaled = f"scaled as {config_path} says"
    beside = lying_beside(config_path.parent, {CONFIG}, options.base)
    return _told(adapter, state, name, path, scaled).replace(beside=beside)


def _with_alpha(state: _State, name: str, path: Path, options: Options) -> AdapterTensorSet:
    ranks = Counter(
        tensor.shape[-2 if "embedding" not in name and len(tensor.shape) < 4 else 0]  # noqa: PLR2004
        for name, tensor in state.tensors.items()
        if _A.search(name) and len(tensor.shape) > 1
    )
    rank = max(ranks, key=lambda rank: ranks[rank], default=0)
    if options.alpha is None:
        raise UsageError(
            f"is {state.what} with a LoRA of rank {rank} and no {CONFIG} beside or above it; "
            "the scale is alpha / r: pass the alpha of the training run with --alpha",
            path=state.folder,
        )
    config = LoraConfig(_shown(state.tensors, rank, options.alpha), state.folder / CONFIG)
    adapter = interpret(state.tensors, config, state.folder, options.base)
    scales = {p.module: options.alpha / p.rank for p in adapter.pairs() if p.rank}
    told = _told(adapter, state, name, path, "scaled by --alpha / r (not use_rslora)")
    # A config that was made up is none to pass on, and contradicts no rank.
    return told.replace(scales={**adapter.scales, **scales}, rank_conflicts={}, source=None)


def _told(
    adapter: AdapterTensorSet, state: _State, name: str, path: Path, scaled: str
) -> AdapterTensorSet:
    said = adapter.provenance.notes if adapter.provenance else ()
    notes = (f"read from {state.what}", scaled, *state.notes, *said)
    return adapter.replace(provenance=Provenance(path, name, notes))


def _dcp_state(path: Path) -> _State:
    folder = dcp_folder(path)
    if folder is None:
        raise NotFoundError(f"holds no checkpoint of torch ({INDEX} and *{DATA_SUFFIX})", path=path)
    checkpoint = read_dcp(folder)
    groups: dict[Trail, dict[str, Trail]] = defaultdict(dict)
    for trail in checkpoint.entries:
        if not is_of_optimizer(trail):
            groups[trail[:-1]][trail[-1]] = trail
    with_factors = [key for key, names in groups.items() if any(_FACTOR.search(n) for n in names)]
    if len(with_factors) > 1:
        shown = ", ".join(".".join(key) or "the root" for key in with_factors)
        raise UnsupportedError(
            f"holds a LoRA in {len(with_factors)} dictionaries ({shown}); save the one that is "
            "meant alone",
            path=folder,
        )
    chosen = with_factors[0] if with_factors else max(groups, key=lambda k: len(groups[k]))
    names = groups[chosen]
    # What an optimizer holds the state of was trained; the rest of the model was not.
    stepped = {part for trail in checkpoint.entries if trail[:-1] != chosen for part in trail}
    trained = [name for name in names if name in stepped]
    notes: list[str] = []
    if trained and len(trained) < len(names):
        notes = [
            f"{len(names) - len(trained)} tensors left out, of which the optimizer has no state"
        ]
    tensors = {name: checkpoint.tensor(names[name]) for name in trained or names}
    return _State(folder, "a sharded checkpoint of torch (DCP)", tensors, tuple(notes))


def _zero_state(path: Path) -> _State:
    folder = step_folder(path)
    if folder is None:
        raise NotFoundError("holds no step of DeepSpeed (*_model_states.pt)", path=path)
    checkpoint = read_zero(folder)
    ranks = f"{checkpoint.ranks} rank{'s' if checkpoint.ranks > 1 else ''}"
    what = f"a checkpoint of DeepSpeed, ZeRO stage {checkpoint.stage} of {ranks}"
    notes: list[str] = []
    if not checkpoint.stage:
        what = "the model states of a checkpoint of DeepSpeed"
        notes.append("no optimizer states lie beside: values are in the type of the training")
    if checkpoint.frozen:
        notes.append(f"{checkpoint.frozen} parameters left out, which were not trained")
    return _State(folder, what, checkpoint.tensors, tuple(notes))


def _shown(tensors: Mapping[str, LazyTensor], rank: int, alpha: float) -> dict[str, Any]:
    """Return the LoraConfig that the names of tensors show, where there is none."""
    saved = dict.fromkeys(m["name"] for name in tensors if (m := _SAVED.search(name)))
    return {
        "peft_type": "LORA",
        "r": rank or 1,
        "lora_alpha": alpha,
        "use_dora": any(".lora_magnitude_vector" in name for name in tensors),
        "lora_bias": any(re.search(r"\.lora_B(?:\.[^.]+)?\.bias$", name) for name in tensors),
        "modules_to_save": list(saved) or None,
    }
