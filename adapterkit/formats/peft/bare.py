"""PEFT's tensors where no adapter_config.json lies with them, from whatever holds them.

What scales the update lies in no tensor: it is in a config above, or given as alpha.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.beside import lying_beside
from adapterkit.errors import FormatError, NotFoundError, UsageError
from adapterkit.formats.peft.bare_files import weights_of
from adapterkit.formats.peft.files import CONFIG, WEIGHTS, parts, stored_tensors
from adapterkit.formats.peft.reader import interpret
from adapterkit.formats.peft.sharded_files import config_above
from adapterkit.formats.peft.state import FACTOR
from adapterkit.json_file import read_json_object
from adapterkit.lora_config.config import LoraConfig
from adapterkit.lora_config.own import Counted, counted, own_config
from adapterkit.model.update import GATHER, ONE_RANK, is_slice
from adapterkit.notes import Note, Provenance
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet, BesideFile

_A = re.compile(r"\.lora_A(?:\.[^.]+)?\.weight$|\.lora_embedding_A(?:\.[^.]+)?$")
_SAVED = re.compile(r"(?:^|\.)(?P<name>[^.]+)\.modules_to_save\.")
_MEGATRON = re.compile(r"\.adapter(?:\.adapter_[a-z]+)?\.linear_in\.weight$")
_MOST_SHOWN = 3


@dataclass(frozen=True, slots=True)
class State:
    """What a checkpoint holds of an adapter.

    Attributes:
        folder: the file, or the directory of its files.
        what: what the checkpoint is, for messages.
        tensors: by PEFT's names of memory.
        notes: what was left out.
    """

    folder: Path
    what: str
    tensors: Mapping[str, LazyTensor]
    notes: tuple[Note | str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


def read_weights(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read a file of PEFT's tensors, or the one in a directory, without a config beside it.

    Args:
        path: a file that torch, safetensors or PEFT itself wrote, or its directory.
        options: `alpha` is the scale numerator.

    Raises:
        NotFoundError: if a shard is missing, or the config of a directory and alpha.
        FormatError: if a file is malformed, or holds one rank's part.
        UnsupportedError: if it holds several adapters, or something beside one.
        UsageError: if alpha is not given, and the file carries no config of its own.
    """
    weights = weights_of(path)
    if weights is None:
        raise NotFoundError(f"holds no weights of an adapter ({', '.join(WEIGHTS)})", path=path)
    stored = stored_tensors(weights)
    own = own_config(stored.metadata, weights)
    if own is None and path.is_dir() and options.alpha is None:
        scaled = (
            f"no {CONFIG} here, which scales {weights.name}; pass the alpha of the training run"
        )
        raise NotFoundError(f"{scaled} with --alpha", path=path, needs="alpha")
    shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
    halves = {name: name.replace(".lora_A.", ".lora_B.") for name in shapes if ".lora_A." in name}
    if is_slice((shapes[a], shapes[b]) for a, b in halves.items() if b in shapes):
        raise FormatError(f"{ONE_RANK}; {GATHER}", path=weights, where=next(iter(halves)))
    state = State(weights, "a file of PEFT's weights", stored.tensors, stored.notes)
    if own is not None:
        beside = weights.parent / CONFIG
        found = Counted(own, weights)
        found = counted(stored.metadata, weights, beside) if beside.is_file() else found
        state = replace(state, notes=(*found.notes, *state.notes))
        return _with_config(state, found, weights.parent, "peft-weights", path, options)
    return _with_alpha(state, "peft-weights", path, options)


def adapter_of(state: State, name: str, path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Return the adapter of a state, scaled by the config beside or above it, or by alpha.

    Args:
        state: the tensors, and what holds them.
        name: of the format.
        path: what was passed.
        options: `alpha` is the scale numerator where there is no config.

    Raises:
        FormatError: if there is no LoRA.
        UsageError: if alpha is not known, or given and another one in the config.
    """
    if not any(FACTOR.search(f".{name}") for name in state.tensors):
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
    if (own := own_config(state.metadata, state.folder)) is not None:
        config = Counted(own, state.folder)
        if config_path:
            config = counted(state.metadata, state.folder, config_path)
        state = replace(state, notes=(*config.notes, *state.notes))
        folder = config_path.parent if config_path else state.folder
        return _with_config(state, config, folder, name, path, options)
    if config_path:
        config = Counted(read_json_object(config_path), config_path)
        return _with_config(state, config, config_path.parent, name, path, options)
    return _with_alpha(state, name, path, options)


def _with_config(
    state: State, found: Counted, folder: Path, name: str, path: Path, options: FormatOptions
) -> AdapterTensorSet:
    config = LoraConfig(found.raw, found.path)
    adapter = interpret(state.tensors, config, state.folder, options.base)
    scaled = f"scaled as {found.path} says"
    if found.path == state.folder:
        scaled = "scaled as the LoraConfig in it says"
    beside = lying_beside(folder, {CONFIG, *_own(state)}, options.base)
    return _told(adapter, state, name, path, scaled).replace(beside=beside)


def _with_alpha(state: State, name: str, path: Path, options: FormatOptions) -> AdapterTensorSet:
    ranks = Counter(
        tensor.shape[-2 if "embedding" not in name and len(tensor.shape) < 4 else 0]  # noqa: PLR2004  (a convolution)
        for name, tensor in state.tensors.items()
        if _A.search(name) and len(tensor.shape) > 1
    )
    rank = max(ranks, key=lambda rank: ranks[rank], default=0)
    if options.alpha is None:
        raise UsageError(
            f"is {state.what} with a LoRA of rank {rank} and no {CONFIG} beside or above it; "
            "the scale is alpha / r: pass the alpha of the training run with --alpha",
            path=state.folder,
            needs="alpha",
        )
    config = LoraConfig(_shown(state.tensors, rank, options.alpha), state.folder / CONFIG)
    adapter = interpret(state.tensors, config, state.folder, options.base)
    scales = {p.module: options.alpha / p.rank for p in adapter.pairs() if p.rank}
    told = _told(adapter, state, name, path, "scaled by --alpha / r (not use_rslora)")
    # A config that was made up is none to pass on, and contradicts no rank.
    return told.replace(
        scales={**adapter.scales, **scales},
        rank_conflicts={},
        source=None,
        beside=_beside(state, path, options),
    )


def _beside(state: State, path: Path, options: FormatOptions) -> tuple[BesideFile, ...]:
    """Return what lies beside a state; a file that is passed by a name of its own lies alone."""
    own = _own(state)
    if own == {path.name} and path.name not in WEIGHTS:
        return ()
    return lying_beside(path if path.is_dir() else path.parent, own, options.base)


def _own(state: State) -> set[str]:
    """Return the names of a state's files, where it is no folder of a run that is known by them."""
    return parts(state.folder) if state.folder.is_file() else set()


def _told(
    adapter: AdapterTensorSet, state: State, name: str, path: Path, scaled: str
) -> AdapterTensorSet:
    said = adapter.provenance.notes if adapter.provenance else ()
    notes = (f"read from {state.what}", scaled, *state.notes, *said)
    return adapter.replace(provenance=Provenance(path, name, notes))


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
