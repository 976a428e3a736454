"""Read PEFT TinyLoRA: ΔW = B (Σᵢ vᵢ Pᵢ) A, with A = S^½ Vᵀ and B = U S^½ in the file.

Formulas and names are those of PEFT 0.21.2 (src/peft/tuners/tinylora). The frozen factors are
always stored, so no base is needed and no sign is in doubt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterkit.architectures import find
from adapterkit.architectures.mapping import find_rule
from adapterkit.containers.safetensors import read_safetensors
from adapterkit.containers.torch_zip import flatten, read_torch_zip
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.formats.peft.files import locate, lying_beside_adapter, stored_tensors
from adapterkit.formats.peft.keys import KeyReader
from adapterkit.formats.peft.reader import read_peft
from adapterkit.formats.peft.tinylora_order import base_type, find_order, round_through
from adapterkit.json_file import read_json_object
from adapterkit.keys import TensorKey
from adapterkit.lora_config.own import own_config
from adapterkit.notes import BaseReference, Provenance
from adapterkit.storage import readable
from adapterkit.tables import TEXT, Table, number, whole
from adapterkit.tensor import LazyTensor
from adapterkit.tinylora import streams
from adapterkit.tinylora.adapter import TinyAdapter, TinyModule, neutral
from adapterkit.tinylora.groups import peft_group_count, peft_groups
from adapterkit.tinylora.settings import SEED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapterkit.architectures import Architecture
    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet

NAME = "tinylora-peft"
_PART = re.compile(r"^(?:base_model\.model\.)?(.+)\.tinylora_([ABP])(?:\.[^.]+)?$")
_VECTOR = re.compile(r"^(?:base_model\.)?(?:model\.)?tinylora_v\.(?:[^.]*[^.\d][^.]*\.)?(\d{1,9})$")
# Embedding tables by the names that transformers gives them, where no family tells.
_EMBEDDINGS = {
    "embed_tokens",
    "embed_positions",
    "embed_in",
    "embeddings",
    "position_embeddings",
    "shared",
    "tok_embeddings",
    "token_embedding",
    "token_type_embeddings",
    "word_embeddings",
    "wpe",
    "wte",
}
_NO_INDEX = "0.19."
_MATRIX, _CUBE = 2, 3


@dataclass(slots=True)
class _Stored:
    """The tensors of a file, sorted by what they are."""

    parts: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    vectors: dict[int, LazyTensor] = field(default_factory=dict)
    others: dict[TensorKey, LazyTensor] = field(default_factory=dict)
    ordered: bool = False
    notes: tuple[str, ...] = ()


def read_peft_tinylora(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read an adapter directory, or its weights file.

    Raises:
        FormatError: if parts are missing, malformed or contradict the config.
        UnsupportedError: if it cannot be rebuilt: PEFT 0.19 without projections.
        BaseRequiredError: if only the base could tell which vector is whose.
        UncheckableError: if projections must be drawn and torch is not installed.
    """
    config_path, weights_path = locate(path)
    config = read_json_object(config_path)
    fields = Table(config, config_path)
    if own_config(stored_tensors(weights_path).metadata, weights_path) is not None:
        return read_peft(path, options)
    stored = _sorted(weights_path, options.base)
    _check(stored, fields, weights_path)
    notes = list(stored.notes)
    modules = _modules(stored, fields, weights_path, options, notes)
    tiny = TinyAdapter(modules=modules, vectors=stored.vectors, form="peft", config=config)
    adapter = neutral(
        tiny,
        base=BaseReference(
            name=fields.optional("base_model_name_or_path", TEXT) or None,
            revision=fields.optional("revision", TEXT) or None,
            architecture=_base_class(fields),
        ),
        provenance=Provenance(path, NAME, tuple(notes)),
        others=stored.others,
    )
    beside = lying_beside_adapter(path, config_path, weights_path, options.base)
    return adapter.replace(beside=beside)


def _sorted(path: Path, base: BaseModel | None) -> _Stored:
    with readable(path), path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    tensors = flatten(read_torch_zip(path).root) if zipped else read_safetensors(path).tensors
    stored = _Stored(ordered=zipped)
    keys = KeyReader(path, tensors, base)
    for name, tensor in tensors.items():
        if match := _VECTOR.match(name):
            if int(match[1]) in stored.vectors:
                raise FormatError("two tensors have this meaning", path=path, where=name)
            stored.vectors[int(match[1])] = tensor
        elif match := _PART.match(name):
            parts = stored.parts.setdefault(match[1], {})
            if match[2] in parts:
                raise FormatError("two tensors have this meaning", path=path, where=name)
            parts[match[2]] = tensor
        elif key := keys.read(name):
            stored.others[key] = tensor
    stored.notes = keys.notes()
    return stored


def _check(stored: _Stored, config: Table, path: Path) -> None:
    """Compare shapes and counts with each other and with the config."""
    if not stored.parts:
        raise FormatError("holds no tinylora_A and tinylora_B", path=path)
    sizes = {vector.shape for vector in stored.vectors.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1 or not next(iter(sizes))[0]:
        shown = sorted(map(list, sizes))
        raise FormatError(f"its vectors tinylora_v have shapes {shown}, not one (u,)", path=path)
    (size,) = next(iter(sizes))
    if (declared := config.get("u", whole(1, 1 << 32), size)) != size:
        raise FormatError(f"u is {declared} in the config, its vectors have {size}", path=path)
    for module, parts in stored.parts.items():
        _check_module(module, parts, size, path)
        _check_rank(module, parts, config.get("r", whole(1, 1 << 20), 2), path)
    tying = _tying(config)
    found, expected = sorted(stored.vectors), peft_group_count(len(stored.parts), tying)
    if found != list(range(expected)):
        raise FormatError(
            f"weight_tying {tying} over {len(stored.parts)} modules makes {expected} vectors, the "
            f"file has {len(found)}: the config is of another adapter, or part of it is missing",
            path=path,
        )


def _tying(config: Table) -> float:
    return config.get("weight_tying", number(0, 1), 0.0)


def _check_module(module: str, parts: Mapping[str, LazyTensor], size: int, path: Path) -> None:
    a, b, p = (parts.get(part) for part in "ABP")
    if a is None or b is None:
        missing = "tinylora_A" if a is None else "tinylora_B"
        raise FormatError(f"has no {missing}", path=path, where=module)
    rank = a.shape[0] if a.is_matrix else 0
    fits = rank > 0 and b.is_matrix and b.shape[1] == rank and a.size and b.size
    if p is not None:
        fits = fits and p.shape == (size, rank, rank)
    if not fits:
        shapes = ", ".join(f"{part} is {list(tensor.shape)}" for part, tensor in parts.items())
        raise FormatError(f"its parts do not fit: {shapes}", path=path, where=module)
    for part, tensor in parts.items():
        if not tensor.dtype.floating:
            raise FormatError(f"tinylora_{part} holds {tensor.dtype}", path=path, where=module)


def _check_rank(module: str, parts: Mapping[str, LazyTensor], rank: int, path: Path) -> None:
    """Compare a rank with the config's, which PEFT cuts to the size of the weight."""
    a, b = parts["A"].shape, parts["B"].shape
    if a[0] != min(rank, a[1], b[0]):
        raise FormatError(
            f"r is {rank} in the config, its factors have {a[0]}", path=path, where=module
        )


def _modules(
    stored: _Stored,
    config: Table,
    path: Path,
    options: FormatOptions,
    notes: list[str],
) -> tuple[TinyModule, ...]:
    names = tuple(stored.parts)
    projections = _stored_projections(stored, config, path)
    architecture = _architecture(config, options)
    seed = config.get("projection_seed", SEED, 42)
    groups = [0] * len(names)
    if len(stored.vectors) > 1 or not projections:
        order = find_order(
            names,
            projections,
            seed=seed,
            rounded=base_type(stored.parts[names[0]]["A"]),
            in_file_order=stored.ordered,
            architecture=architecture,
            path=path,
        )
        names = order.names
        groups = peft_groups(len(names), _tying(config))
        notes.append(f"order of the modules: {order.note}")
    if not projections:
        projections = _drawn(stored, names, seed, notes)
    return tuple(
        TinyModule(
            name=name,
            left=stored.parts[name]["B"],
            right=stored.parts[name]["A"],
            projection=projections[name],
            group=group,
            embedding=_is_embedding(name, architecture),
        )
        for name, group in zip(names, groups, strict=True)
    )


def _stored_projections(stored: _Stored, config: Table, path: Path) -> dict[str, LazyTensor]:
    """Return every module's projection, or none; refuse what can be neither read nor drawn."""
    found = {name: parts["P"] for name, parts in stored.parts.items() if "P" in parts}
    if not found:
        _refuse_unseeded(config, path)
    elif lacking := [name for name in stored.parts if name not in found]:
        raise FormatError("has no tinylora_P, other modules have", path=path, where=lacking[0])
    return found


def _drawn(
    stored: _Stored, names: tuple[str, ...], seed: int, notes: list[str]
) -> dict[str, LazyTensor]:
    """Return projections drawn again; they went through the base's type."""
    size = next(iter(stored.vectors.values())).size
    drawn: dict[str, LazyTensor] = {}
    rounded: set[DType] = set()
    for index, name in enumerate(names):
        a = stored.parts[name]["A"]
        through = base_type(a)
        rounded.add(through)
        values = streams.peft_projection(index, seed, size, a.shape[0])
        drawn[name] = LazyTensor.of(round_through(values, through), DType.F32)
    kinds = ", ".join(sorted(rounded))
    notes.append(f"projections are not in the file: drawn again from seed {seed}, in {kinds}")
    return drawn


def _refuse_unseeded(config: Table, path: Path) -> None:
    version = config.optional("peft_version", TEXT) or ""
    if version.startswith(_NO_INDEX):
        raise UnsupportedError(
            f"PEFT {version} drew the projections from a number of the running process and "
            "save_projection was off: no one can draw them again; save with save_projection=True",
            path=path,
        )


def _architecture(config: Table, options: FormatOptions) -> Architecture | None:
    if options.base:
        return options.base.architecture
    name = _base_class(config)
    found = find(name) if name else ()
    return found[0] if found else None


def _base_class(config: Table) -> str | None:
    recorded = config.table("auto_mapping")
    return recorded.optional("base_model_class", TEXT) or None if recorded else None


def _is_embedding(module: str, architecture: Architecture | None) -> bool:
    match = find_rule(architecture, module) if architecture else None
    if match is not None:
        return match.rule.kind in {"embedding", "positions"}
    return module.rpartition(".")[2] in _EMBEDDINGS
