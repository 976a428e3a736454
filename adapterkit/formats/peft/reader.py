"""Read PEFT LoRA adapters: a directory, one of its sub-directories, or the weights file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.formats.peft.experts import unfold_experts
from adapterkit.formats.peft.files import locate, lying_beside_adapter, stored_tensors
from adapterkit.formats.peft.frozen import without_frozen
from adapterkit.formats.peft.keys import KeyReader
from adapterkit.formats.peft.layouts import in_place, is_stack
from adapterkit.formats.peft.slots import SETTINGS, spelled_out
from adapterkit.formats.peft.tying import folded, tied_tables
from adapterkit.keys import FACTORS, Role, TensorKey
from adapterkit.lora_config.config import LoraConfig
from adapterkit.lora_config.declared import adapted, contradictions, unselected
from adapterkit.lora_config.meaning import meaning
from adapterkit.lora_config.own import counted
from adapterkit.model import AdapterTensorSet, Kind, PeftSource
from adapterkit.model.declared import UNDECIDED
from adapterkit.notes import BaseReference, Note, Provenance
from adapterkit.tables import TEXT, listed, whole
from adapterkit.tensor import same_bits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.tensor import LazyTensor

_MATRIX = 2
_MOST_BLOCKS = 1 << 16


def read_peft(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read a PEFT LoRA adapter; tensors stay on disk until they are asked for.

    Args:
        path: directory, or weights file beside its config.
        options: `base`: only old layouts of experts may need it, and tokenizers are compared.

    Raises:
        NotFoundError: if there is no adapter at the path.
        FormatError: if a file is malformed or two tensors have one meaning.
        UnsupportedError: if a setting makes it something other than a low-rank update.
    """
    config_path, weights_path = locate(path)
    stored = stored_tensors(weights_path)
    found = counted(stored.metadata, weights_path, config_path)
    adapter = interpret(
        stored.tensors, LoraConfig(found.raw, found.path), weights_path, options.base
    )
    adapter = in_place(adapter, options.base, weights_path)
    notes = (*found.notes, *stored.notes, *(adapter.provenance.notes if adapter.provenance else ()))
    if path.is_dir() and config_path.parent != path:
        notes = (*notes, f"read from the sub-directory {config_path.parent.name}")
    beside = lying_beside_adapter(path, config_path, weights_path, options.base)
    return adapter.replace(beside=beside, provenance=Provenance(path, "peft", notes))


def interpret(
    stored: Mapping[str, LazyTensor], config: LoraConfig, path: Path, base: BaseModel | None = None
) -> AdapterTensorSet:
    """Give PEFT's tensors their meaning.

    Args:
        stored: tensors by PEFT's saved names, wrappers and adapter names possibly leaked in.
        config: the LoraConfig that they were trained with.
        path: where they come from, for messages.
        base: the model; it tells wrappers from modules, and old layouts of experts may need it.

    Raises:
        FormatError: if there is no tensor, or two have one meaning.
        UnsupportedError: if a tensor or setting is something other than a low-rank update.
    """
    keys = KeyReader(path, stored, base)
    tensors: dict[TensorKey, LazyTensor] = {}
    for name, tensor in stored.items():
        key = keys.read(name)
        if key is None:
            continue
        if key in tensors and same_bits(tensors[key], tensor):
            continue  # PEFT saves a resized and trained output under both of its names
        if key in tensors:
            raise FormatError("two tensors have this meaning", path=path, where=str(key))
        tensors[key] = tensor
    if not tensors:
        raise FormatError("holds no tensors; training saved an empty adapter", path=path)
    tensors, frozen = without_frozen(tensors, config)
    tied = tied_tables(tensors, config)
    second = tensors.keys()
    tensors = folded(tensors, tied)
    second -= tensors.keys()
    notes: list[str] = [*keys.notes(), *frozen, *_second_names(tied)]
    tensors, fused = spelled_out(tensors, config)
    if fused:
        notes.append(f"slots of {len(fused)} fused layers (enable_lora) written out in full")
    kinds = _convolutions(tensors, config)
    tensors, stacks = unfold_experts(tensors, config, base)
    kinds |= dict.fromkeys(stacks, Kind.EXPERTS)
    tensors, scales = _interpreted(config, tensors, notes)
    declared = contradictions(config, [*tensors, *second], base)
    modules = (m for m in adapted(tensors) if m not in stacks and not config.is_parameter(m))
    denied, unchecked = unselected(config.raw, modules)
    declared["undeclared"] |= denied
    adapter = AdapterTensorSet(
        tensors=tensors,
        scales=scales,
        kinds=kinds,
        base=BaseReference(
            name=config.fields.optional("base_model_name_or_path", TEXT) or None,
            revision=config.fields.optional("revision", TEXT) or None,
            architecture=config.mapping("auto_mapping").optional("base_model_class", TEXT) or None,
        ),
        tied=tied,
        rank_conflicts={
            module: ranks
            for module, ranks in _conflicts(config, tensors, kinds).items()
            if module not in fused
        },
        source=PeftSource(
            {name: value for name, value in config.raw.items() if name not in SETTINGS},
            tuple(scales),
        ),
        **declared,
        **meaning(config),
    )
    return _on_base(adapter, base, (*notes, *unchecked), path)


def _second_names(tied: Mapping[str, tuple[str, ...]]) -> Iterator[Note]:
    for table, names in tied.items():
        for name in names:
            yield Note(f"is the update of {table} under a second name", subject=name)


def _convolutions(tensors: Mapping[TensorKey, LazyTensor], config: LoraConfig) -> dict[str, Kind]:
    """Return the adapted convolutions: PEFT saves every other factor with two axes.

    Raises:
        UnsupportedError: if one is grouped: each group of outputs has its own rows of A, so the
            update is that of a layer without groups, which the base does not have.
    """
    found: dict[str, Kind] = {}
    for key, tensor in tensors.items():
        if key.role not in FACTORS or len(tensor.shape) <= _MATRIX:
            continue
        if is_stack(key.module):
            found[key.module] = Kind.EXPERTS
            continue
        found[key.module] = Kind.CONVOLUTION
        a = tensors.get(TensorKey(key.module, Role.LORA_A))
        rank = a.shape[0] if a is not None and a.shape else 0
        width = tensor.shape[1]
        if key.role is Role.LORA_B and width and rank == config.rank_of(key.module) != width:
            groups, odd = divmod(rank, width)
            if not odd:
                raise UnsupportedError(
                    f"is a convolution of {groups} groups (A has rank {rank}, B {width}): its "
                    "update is no weight of the base, and PEFT cannot merge it either",
                    path=config.path,
                    where=key.module,
                )
    return found


def _interpreted(
    config: LoraConfig,
    tensors: dict[TensorKey, LazyTensor],
    notes: list[str],
) -> tuple[dict[TensorKey, LazyTensor], dict[str, float]]:
    """Resolve scales, and spell out factors that are stored folded up."""
    adapted = dict.fromkeys(
        key.module
        for key in tensors
        if key.role not in {Role.FULL, Role.TOKEN_ROWS, Role.BASE_COPY}
    )
    scales = {module: config.scale_of(module) for module in adapted}
    if config.mapping("use_bdlora").fields:
        tensors = _block_diagonal(config, tensors)
        notes.append("block-diagonal factors (use_bdlora) written out in full")
    return tensors, scales


def _on_base(
    adapter: AdapterTensorSet, base: BaseModel | None, notes: tuple[str, ...], path: Path
) -> AdapterTensorSet:
    """Settle what only the base decides, if it is known, and say where the adapter is from."""
    said: tuple[str | Note, ...] = ()
    if adapter.pooled_inputs and base is None:
        said = (UNDECIDED,)
    elif adapter.pooled_inputs:
        from adapterkit.passes.pooling import decided
        from adapterkit.passes.protocol import Context

        done = decided(adapter, Context(base=base))
        adapter, said = done.adapter, done.notes
    return adapter.replace(provenance=Provenance(path, "peft", (*notes, *said)))


def _block_diagonal(
    config: LoraConfig, tensors: dict[TensorKey, LazyTensor]
) -> dict[TensorKey, LazyTensor]:
    fields = config.mapping("use_bdlora")
    blocks = fields.get("nblocks", whole(1, _MOST_BLOCKS), 1)
    patterns = {
        role: fields.optional(name, listed(TEXT)) or ()
        for role, name in (
            (Role.LORA_A, "target_modules_bd_a"),
            (Role.LORA_B, "target_modules_bd_b"),
        )
    }
    return {
        key: _spelled_out(tensor, blocks, config, key)
        if any(pattern in key.module for pattern in patterns.get(key.role, ()))
        else tensor
        for key, tensor in tensors.items()
    }


def _spelled_out(tensor: LazyTensor, blocks: int, config: LoraConfig, key: TensorKey) -> LazyTensor:
    """Return block_diag of `blocks` equal groups of rows."""
    import numpy as np

    if not tensor.is_matrix or tensor.shape[0] % blocks:
        message = f"has shape {list(tensor.shape)}, not {blocks} equal blocks of rows (use_bdlora)"
        raise FormatError(message, path=config.path, where=str(key))
    rows, width = tensor.shape

    def spread(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        full = np.zeros((rows, width * blocks), x.dtype)
        step = rows // blocks
        for block in range(blocks):
            full[block * step : (block + 1) * step, block * width : (block + 1) * width] = x[
                block * step : (block + 1) * step
            ]
        return full

    return tensor.map(spread, shape=(rows, width * blocks))


def _conflicts(
    config: LoraConfig, tensors: Mapping[TensorKey, LazyTensor], kinds: Mapping[str, Kind]
) -> dict[str, tuple[int, int]]:
    """Return modules whose tensors have another rank than the config: PEFT would not load them."""
    conflicts: dict[str, tuple[int, int]] = {}
    for key, tensor in tensors.items():
        if key.role in {Role.LORA_A, Role.EMBEDDING_A} and len(tensor.shape) > 1:
            declared = config.rank_of(key.module)
            convolution = kinds.get(key.module) is Kind.CONVOLUTION
            stored = tensor.shape[0 if convolution else -2]
            if stored != declared:
                conflicts[key.module] = declared, stored
    return conflicts
