"""A merged GGUF file: untouched tensors are byte ranges, metadata passes through."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from adapterkit.containers.gguf import read_gguf, uint32, write_gguf
from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.merge.into.blocks import Merger, total
from adapterkit.merge.into.engine import EMBEDDING, OUTPUT, engine_steps
from adapterkit.merge.into.progress import counter
from adapterkit.merge.into.steps import Change
from adapterkit.merge.into.tying import Tying, resolved
from adapterkit.storage import FileSlice, staged
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from adapterkit.base.model import BaseModel
    from adapterkit.containers.gguf import GGUFValue
    from adapterkit.merge.into.blocks import Place, Sums
    from adapterkit.merge.into.report import TensorReport
    from adapterkit.merge.into.steps import Step
    from adapterkit.merge.planning import Source

TYPES = {
    "f32": DType.F32,
    "f16": DType.F16,
    "bf16": DType.BF16,
    "q8_0": DType.Q8_0,
}
_KEPT = frozenset(TYPES.values())
# What the gguf package can quantise to; K and I types have no kernel there.
_KERNELS = _KEPT | {DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1, DType.MXFP4}
# llama.cpp's llama_ftype of files whose matrices are mostly of one type.
_FILE_TYPES = {
    DType.F32: 0,
    DType.F16: 1,
    DType.Q4_0: 2,
    DType.Q4_1: 3,
    DType.Q8_0: 7,
    DType.Q5_0: 8,
    DType.Q5_1: 9,
    DType.BF16: 32,
}
_QUANTISATION_VERSION = 2
_LEAST_SURVIVAL = 0.9


def check_type(kind: str | None) -> None:
    """Refuse an unknown type.

    Raises:
        UsageError: the message lists all.
    """
    if kind not in {None, "keep", *TYPES}:
        known = ", ".join(("keep", *TYPES))
        raise UsageError(f"unknown gguf type {kind!r}; known: {known}")


def merge_gguf(
    sources: Sequence[Source],
    base: BaseModel,
    destination: Path,
    *,
    kind: str | None,
    tied: str | None,
    force: bool,
    jobs: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[TensorReport], list[str]]:
    """Write the merged model; return what was done to each changed tensor, and notes.

    Raises:
        UnsupportedError: if something has no place there, or `keep` would lose the update.
        DestinationExistsError: if the destination exists and `force` is false.
        WriteError: if the output cannot be written.
    """
    changes = plan_gguf(sources, base, kind=kind, tied=tied)
    least = 0.0 if force or kind != "keep" else _LEAST_SURVIVAL
    reports: list[TensorReport] = []
    count = counter(sum(change.stored.nbytes for change in changes.values()), progress)
    tensors = {
        name: _computed(changes[name], reports, least, jobs, count) if name in changes else tensor
        for name, tensor in _with_output(base.tensors, changes).items()
    }
    notes: list[str] = []
    metadata, alignment = _metadata(base, tensors, notes)
    with staged(destination, force=force) as staging:
        write_gguf(staging, metadata, tensors, alignment=alignment)
    return reports, notes


def plan_gguf(
    sources: Sequence[Source], base: BaseModel, *, kind: str | None, tied: str | None
) -> dict[str, Change]:
    """Decide what every tensor gets and as which type it is stored."""
    steps: dict[str, list[Step]] = {}
    for source in sources:
        for name, more in engine_steps(source, base).items():
            steps.setdefault(name, []).extend(more)
    if base.tied:
        steps = resolved(steps, Tying(EMBEDDING, OUTPUT, stored=False), tied)
    changes: dict[str, Change] = {}
    for name, given in steps.items():
        tensor = base.tensors.get(name) or base.tensors[EMBEDDING]
        dtype = _stored_type(name, tensor, kind) if given else tensor.dtype
        changes[name] = Change(name, tensor, tuple(given), dtype, tensor.shape)
    return changes


def _stored_type(name: str, tensor: LazyTensor, kind: str | None) -> DType:
    """Return the type that a changed tensor is stored as.

    Low-bit grids are so coarse that a small update rounds back to where it was; q8_0 keeps it.
    """
    if len(tensor.shape) < 2:  # noqa: PLR2004  (engines want vectors as they are)
        return tensor.dtype
    if kind in TYPES:
        wanted = TYPES[kind]
    elif kind == "keep" or tensor.dtype in _KEPT:
        wanted = tensor.dtype
    else:
        wanted = DType.Q8_0
    if wanted not in _KERNELS:
        raise UnsupportedError(
            f"nothing here can quantise to {wanted}; leave out keep, and it becomes q8_0",
            where=name,
        )
    return wanted if tensor.shape[-1] % wanted.block == 0 else DType.F16


def _with_output(
    tensors: Mapping[str, LazyTensor], changes: Mapping[str, Change]
) -> dict[str, LazyTensor]:
    """Return the tensors in the base's order, an output that is new after the embedding."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if name == EMBEDDING and OUTPUT in changes and OUTPUT not in tensors:
            found[OUTPUT] = tensor
    return found


def _computed(
    change: Change,
    reports: list[TensorReport],
    least: float,
    jobs: int,
    progress: Callable[[int], None],
) -> LazyTensor:
    """Return a tensor that is computed when the writer comes to it, as stored bytes."""
    if not change.steps:
        progress(change.source.nbytes)  # the writer copies it
        return change.source

    def read() -> bytearray:
        merger = Merger(change)
        data = bytearray(change.stored.nbytes)
        merger.prepare()

        def one(place: Place) -> Sums:
            block, sums = merger.block(place)
            begin = merger.offset(place)
            data[begin : begin + len(block)] = block
            progress(len(block))
            return sums

        places = merger.places()
        if jobs == 1 or len(places) == 1:
            parts = [one(place) for place in places]
        else:
            with ThreadPoolExecutor(jobs) as pool:
                parts = list(pool.map(one, places))
        report = merger.report(total(parts))
        if report.survival is not None and report.survival < least:
            raise UnsupportedError(
                f"as {change.dtype} only {report.survival:.0%} of the update is left; leave out "
                "keep, and it becomes q8_0, or --force it",
                where=change.name,
            )
        reports.append(report)
        return data

    return LazyTensor(change.dtype, change.shape, read)


def _metadata(
    base: BaseModel, tensors: Mapping[str, LazyTensor], notes: list[str]
) -> tuple[dict[str, GGUFValue], int]:
    """Return the base's metadata with the file type of what is stored now, and the alignment."""
    first = min(
        (span.path for t in base.tensors.values() if isinstance(span := t.read, FileSlice)),
        key=lambda path: path.name,
    )
    file = read_gguf(first)
    found = file.typed()
    for key in [key for key in found if key.startswith("split.")]:
        del found[key]
    if first != base.path or "split.count" in file.metadata:
        notes.append("the parts of the base are written as one file")
    before, after = _main_type(base.tensors), _main_type(tensors)
    if before is not after and after in _FILE_TYPES:
        found["general.file_type"] = uint32(_FILE_TYPES[after])
        notes.append(f"most weights are {after} now, of {before}: general.file_type says so")
    if any(tensor.dtype.quantised for tensor in tensors.values()):
        found.setdefault("general.quantization_version", uint32(_QUANTISATION_VERSION))
    return found, file.alignment


def _main_type(tensors: Mapping[str, LazyTensor]) -> DType:
    """Return the type of most elements of the layers' matrices; the tables often have their own."""
    matrices = {name: t for name, t in tensors.items() if len(t.shape) > 1}
    layers = [t for name, t in matrices.items() if name.startswith("blk.")]
    counts: dict[DType, int] = {}
    for tensor in layers or matrices.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.size
    return max(counts, key=lambda dtype: counts[dtype])
