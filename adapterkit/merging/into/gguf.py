"""A merged GGUF file: untouched tensors are byte ranges, metadata passes through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.architectures.mixtures import mixtures
from adapterkit.containers.gguf import GGUFValue, gguf_layout, read_gguf, uint32
from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError, UsageError, unknown
from adapterkit.merging.into.calibration import calibrated_inputs
from adapterkit.merging.into.engine import EMBEDDING, OUTPUT, engine_steps
from adapterkit.merging.into.inputs import drawn_inputs
from adapterkit.merging.into.merged_base import merged_base
from adapterkit.merging.into.report import MOST_ERROR
from adapterkit.merging.into.rounding import can_be_shaped, shaped_changes
from adapterkit.merging.into.ruled import ruled
from adapterkit.merging.into.steps import Change
from adapterkit.merging.into.tying import Tying, as_spelled, resolved
from adapterkit.merging.into.writing import OutputFile, Piece
from adapterkit.quantisation import check_encodable
from adapterkit.stamps import OURS
from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapterkit.architectures.mixtures import Mixture
    from adapterkit.base.model import BaseModel
    from adapterkit.containers.gguf import GGUFFile
    from adapterkit.merging.combination import Combination
    from adapterkit.merging.into.steps import Applied, Shaping, Step
    from adapterkit.merging.planning import Source

# What changed tensors may be stored as, the others being as they were.
TYPES = {
    "f32": DType.F32,
    "f16": DType.F16,
    "bf16": DType.BF16,
    "q8_0": DType.Q8_0,
}
_KEPT = frozenset(TYPES.values())
_HALVES = frozenset({DType.F16, DType.BF16})
_PLAIN = _HALVES | {DType.F32, DType.F64}
# llama.cpp's llama_ftype of files whose matrices are mostly of one type; the mixtures know theirs.
_FILE_TYPES = {DType.F32: 0, DType.F16: 1, DType.Q8_0: 7, DType.BF16: 32}
_QUANTISATION_VERSION = 2
_LEAST_SURVIVAL = 0.9
ROUNDINGS = ("nearest", "shaped")


@dataclass(frozen=True, slots=True)
class Allowed:
    """What is refused for the quality of the result, unless it is asked for.

    Attributes:
        requantise: quantise again what is quantised already.
        weak: keep a type that loses much of the update.
    """

    requantise: bool = False
    weak: bool = False


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What will be written.

    Attributes:
        tensors: every tensor of the output, in order; those that change without a way to read them.
        changes: how these are computed.
        metadata: the base's, with the file type of what is stored now.
        alignment: of the tensors' offsets.
        notes: what the user should know.
    """

    tensors: Mapping[str, LazyTensor]
    changes: Mapping[str, Change]
    metadata: Mapping[str, GGUFValue]
    alignment: int
    notes: tuple[str, ...]

    def output(self, name: str) -> OutputFile:
        """Return the file to write."""
        header, offsets, size = gguf_layout(self.metadata, self.tensors, alignment=self.alignment)
        pieces = tuple(
            Piece(at, self.changes.get(tensor) or _range(tensor, stored))
            for at, (tensor, stored) in zip(offsets, self.tensors.items(), strict=True)
        )
        return OutputFile(name, header, pieces, size)


def _range(name: str, tensor: LazyTensor) -> FileSlice:
    if not isinstance(tensor.read, FileSlice):
        raise TypeError(f"{name} is no byte range of the base")
    return tensor.read


def check_type(kind: str | None) -> None:
    """Refuse an unknown type.

    Raises:
        UsageError: the message lists all.
    """
    if kind is not None and kind not in {"keep", *TYPES, *mixtures()}:
        raise unknown("gguf type", kind, ("keep", *TYPES, *mixtures()))


def plan_gguf(
    sources: Sequence[Source],
    base: BaseModel,
    *,
    kind: str | None,
    tied: str | None,
    rounding: str | None,
    calibrate: Path | None = None,
    allow: Allowed,
    how: Combination | None = None,
) -> EnginePlan:
    """Decide what every tensor gets and as which type it is stored.

    Raises:
        UnsupportedError: if something has no place there, or no kernel writes a type.
        IncompatibleBaseError: if an adapter does not fit the base.
        UsageError: if nothing would be calibrated, or by too little.
        FormatError: if what is to calibrate is no text and no imatrix of this model.
        UncheckableError: if a library that a text needs is not installed.
    """
    steps: dict[str, list[Step]] = {}
    sources = as_spelled(sources, tied=base.tied, choice=tied)
    for source in sources:
        for name, more in engine_steps(source, base).items():
            steps.setdefault(name, []).extend(more)
    if base.tied:
        steps = resolved(steps, Tying(EMBEDDING, OUTPUT, stored=False), tied, sources)
    applied = ruled(steps, sources, how)
    tensors = _with_output(base.tensors, applied)
    mixture = mixtures().get(kind or "")
    if mixture is None:
        types = {name: _changed_type(tensors[name], kind) for name, each in applied.items() if each}
    else:
        types = _mixed_types(mixture, base, tensors, allow)
    changes = _changes(tensors, applied, types, mixture)
    notes: list[str] = []
    file = _first_file(base, notes)
    if kind == "keep" and not allow.weak:
        changes = {n: _held_to(change, _LEAST_SURVIVAL) for n, change in changes.items()}
    if rounding == "shaped" or (kind == "keep" and rounding is None):
        most = math.inf if allow.weak else MOST_ERROR
        names = [name for name, change in changes.items() if can_be_shaped(change)]
        if calibrate is not None and not names:
            raise UsageError(
                "nothing is rounded by what it listens to here; leave it out", path=calibrate
            )
        merged = merged_base(base, changes)
        inputs = (
            drawn_inputs(merged, file, names)
            if calibrate is None
            else calibrated_inputs(merged, file, names, calibrate)
        )
        changes = shaped_changes(changes, inputs, most)
        notes += _on_rounding(names, inputs)
    stored = {name: changes[name].stored if name in changes else t for name, t in tensors.items()}
    twice = [name for name in tensors if mixture and _requantised(tensors[name], types[name])]
    if twice:
        notes.append(f"quantised twice, with the errors of both: {len(twice)} tensors ({twice[0]})")
    metadata = _metadata(base, file, stored, mixture, notes)
    return EnginePlan(stored, changes, metadata, file.alignment, tuple(notes))


def _with_output(
    tensors: Mapping[str, LazyTensor], steps: Mapping[str, Sequence[Applied]]
) -> dict[str, LazyTensor]:
    """Return the base's tensors in its order, an output that is new after the embedding."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if name == EMBEDDING and OUTPUT in steps and OUTPUT not in tensors:
            found[OUTPUT] = tensor
    return found


def _changed_type(tensor: LazyTensor, kind: str | None) -> DType:
    """Return the type that a changed tensor is stored as.

    Low-bit grids are so coarse that a small update rounds back to where it was; q8_0 keeps it.
    """
    if len(tensor.shape) <= 1:  # engines want vectors as they are
        return tensor.dtype
    if kind in TYPES:
        wanted = TYPES[kind]
    elif kind == "keep" or tensor.dtype in _KEPT:
        wanted = tensor.dtype
    else:
        wanted = DType.Q8_0
    return wanted if tensor.shape[-1] % wanted.block == 0 else DType.F16


def _mixed_types(
    mixture: Mixture, base: BaseModel, tensors: Mapping[str, LazyTensor], allow: Allowed
) -> dict[str, DType]:
    """Return the types that llama.cpp's quantiser would give the whole merged model."""
    types = mixture.types(base.architecture.gguf, base.facts, tensors)
    for name, tensor in tensors.items():
        if _requantised(tensor, types[name]) and not allow.requantise:
            raise UnsupportedError(
                f"is {tensor.dtype} already, and {types[name]} would add its own error to that: "
                f"merge into the f16 or bf16 GGUF that {mixture.name} is made from, or pass "
                "--allow-requantise",
                path=base.path,
                where=name,
            )
    return types


def _requantised(tensor: LazyTensor, dtype: DType) -> bool:
    return tensor.dtype.quantised and tensor.dtype is not dtype


def _changes(
    tensors: Mapping[str, LazyTensor],
    steps: Mapping[str, Sequence[Applied]],
    types: Mapping[str, DType],
    mixture: Mixture | None,
) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for name, tensor in tensors.items():
        given = tuple(steps.get(name, ()))
        dtype = types.get(name, tensor.dtype)
        if not given and dtype is tensor.dtype:
            continue
        if dtype.quantised:
            _check_kernel(name, dtype)
        # A mixture is what the quantiser makes of the merged file, which is of the base's type.
        via = tensor.dtype if mixture and given and tensor.dtype in _HALVES else None
        changes[name] = Change(name, tensor, given, dtype, tensor.shape, via)
    return changes


def _check_kernel(name: str, dtype: DType) -> None:
    try:
        check_encodable(dtype)
    except UnsupportedError as error:
        raise UnsupportedError(error.message, where=name) from error


def _held_to(change: Change, least: float) -> Change:
    return replace(change, least=least) if change.dtype not in _PLAIN else change


def check_rounding(rounding: str | None, kind: str | None, calibrate: Path | None) -> None:
    """Refuse a rounding that is unknown, or shaped or calibrated where nothing would be.

    Raises:
        UsageError: the message lists what there is.
    """
    if rounding is not None and rounding not in ROUNDINGS:
        raise unknown("rounding", rounding, ROUNDINGS)
    if rounding == "shaped" and (kind is None or kind in TYPES):
        raise UsageError(
            "shaped rounding is for block types of 4 to 6 bits: it goes with gguf_type "
            "(--gguf-type) keep or a mixture, such as q4_k_m"
        )
    if calibrate is not None and rounding != "shaped" and (kind != "keep" or rounding is not None):
        raise UsageError(
            "calibrate (--calibrate) is for shaped rounding: it goes with gguf_type (--gguf-type) "
            "keep, or with rounding (--rounding) shaped"
        )


def _on_rounding(names: Sequence[str], inputs: Mapping[str, Shaping]) -> list[str]:
    if not names or inputs:
        return []
    missing = "what the base's layers see of texts, which makes it better, is not known here"
    return [f"rounding is shaped by the adapter alone: {missing}; --calibrate TEXT tells it"]


def _first_file(base: BaseModel, notes: list[str]) -> GGUFFile:
    """Return the file with the metadata: the first of a split base."""
    first = min(
        (span.path for t in base.tensors.values() if isinstance(span := t.read, FileSlice)),
        key=lambda path: path.name,
    )
    file = read_gguf(first)
    if first != base.path or "split.count" in file.metadata:
        notes.append("the parts of the base are written as one file")
    return file


def _metadata(
    base: BaseModel,
    file: GGUFFile,
    tensors: Mapping[str, LazyTensor],
    mixture: Mixture | None,
    notes: list[str],
) -> dict[str, GGUFValue]:
    """Return the base's metadata with the file type of what is stored now."""
    found = {
        key: value for key, value in file.typed().items() if not key.startswith(("split.", OURS))
    }
    before, after = _main_type(base.tensors), _main_type(tensors)
    if mixture:
        found["general.file_type"] = uint32(mixture.file_type)
        notes.append(f"the whole model is {mixture.name} now: general.file_type says so")
    elif before is not after and after in _FILE_TYPES:
        found["general.file_type"] = uint32(_FILE_TYPES[after])
        notes.append(f"most weights are {after} now, of {before}: general.file_type says so")
    if any(tensor.dtype.quantised for tensor in tensors.values()):
        found.setdefault("general.quantization_version", uint32(_QUANTISATION_VERSION))
    return found


def _main_type(tensors: Mapping[str, LazyTensor]) -> DType:
    """Return the type of most elements of the layers' matrices; the tables often have their own."""
    matrices = {name: t for name, t in tensors.items() if len(t.shape) > 1}
    layers = [t for name, t in matrices.items() if name.startswith("blk.")]
    counts: dict[DType, int] = {}
    for tensor in layers or matrices.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.size
    return max(counts, key=lambda dtype: counts[dtype])
