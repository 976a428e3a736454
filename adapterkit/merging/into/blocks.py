"""Blocks of rows: read, add everything, round once.

Memory is a block and the factors, whatever the size of the tensor; ΔW is never there as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.base.decoding import stored_type
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.merging.into.operations import Sum, operations
from adapterkit.merging.into.report import NearestReport, TensorReport
from adapterkit.merging.into.rounding import Rounder
from adapterkit.merging.into.rows import Place, decoded, reader
from adapterkit.merging.into.ruled import Rules
from adapterkit.merging.into.steps import Change, Product, Ruled
from adapterkit.model import Kind
from adapterkit.storage import FileSlice, Ranges
from adapterkit.tensor import LazyTensor, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from adapterkit.merging.into.operations import Operation

Array = np.ndarray[Any, np.dtype[Any]]

# Elements of a block: few enough for all passes to stay in the cache, enough for the interpreter's
# share to be small.
BLOCK = 1 << 17
# The same where rounding goes through the columns one by one.
SHAPED_BLOCK = 1 << 22
_STACK = 3
_EXPONENT = {DType.F16: 0x7C00, DType.BF16: 0x7F80}


@dataclass(slots=True)
class Left:
    """What a rounding leaves of an update, W' being the result.

    Attributes:
        kept: ⟨W' - W, ΔW⟩.
        noise: ‖(W' - W) - ΔW‖².
        own: the same along the adapter's own directions.
        output: the same of outputs, for the inputs that are known.
    """

    kept: float = 0.0
    noise: float = 0.0
    own: float = 0.0
    output: float = 0.0

    def __add__(self, other: Left) -> Left:
        """Add up the sums of two disjoint blocks."""
        return Left(
            self.kept + other.kept,
            self.noise + other.noise,
            self.own + other.own,
            self.output + other.output,
        )


@dataclass(slots=True)
class Sums:
    """Squared norms and the inner products that survival is made of.

    Attributes:
        base: ‖W‖².
        update: ‖ΔW‖².
        output: the same of outputs, for the inputs that are known.
        left: of what is stored.
        nearest: of what nearest rounding makes, where another is used.
    """

    base: float = 0.0
    update: float = 0.0
    output: float = 0.0
    left: Left = field(default_factory=Left)
    nearest: Left = field(default_factory=Left)

    def __add__(self, other: Sums) -> Sums:
        """Add up the sums of two disjoint blocks."""
        return Sums(
            self.base + other.base,
            self.update + other.update,
            self.output + other.output,
            self.left + other.left,
            self.nearest + other.nearest,
        )


class Merger:
    """Computes a change, block by block, in any order and on several threads.

    Sums are formed in float32 for bases of 16 bits and fewer, in float64 for others, for all
    adapters together, and rounded once.
    """

    def __init__(self, change: Change) -> None:
        self.change = change
        self.matrices, self.rows, self.columns = _geometry(change)
        wide = stored_type(change.source) in {DType.F32, DType.F64} or change.dtype is DType.F64
        self.kind = np.dtype(np.float64 if wide else np.float32)

    @property
    def block(self) -> int:
        """Return how many elements there are in a block."""
        return SHAPED_BLOCK if self.change.shaping else BLOCK

    @property
    def steps(self) -> int:
        """Return how many steps there are in all."""
        return len(self.change.steps)

    def prepare(self) -> None:
        """Open the adapters' tensors, before several threads ask for blocks."""
        _ = self._operations, self._rounder

    def places(self) -> list[Place]:
        """Return all blocks, in the order in which they are stored."""
        height = max(1, self.block // max(1, self.columns))
        return [
            Place(matrix, start, min(start + height, self.rows))
            for matrix in range(self.matrices)
            for start in range(0, self.rows, height)
        ]

    def offset(self, place: Place) -> int:
        """Return the first byte of a block in the stored tensor."""
        rows = place.matrix * self.rows + place.start
        return rows * self.change.dtype.nbytes((self.columns,))

    def run(self, places: Sequence[Place], write: Callable[[memoryview, int], None]) -> Sums:
        """Compute some blocks one after another, in the same memory.

        Args:
            places: which blocks.
            write: takes a block's stored bytes, valid until it returns, and their offset.

        Raises:
            FormatError: if an adapter or the base holds NaN or infinity.
            UnsupportedError: if the stored type cannot hold a value.
        """
        height = max(place.stop - place.start for place in places)
        done = Sums()
        # An overflow, in the base or of a sum, is looked for in what the block adds up to.
        with Ranges() as ranges, np.errstate(all="ignore"):
            memory = _Memory(height, self.columns, self.kind, self.change.dtype, ranges)
            for place in places:
                data, sums = self._block(place, memory)
                write(data, self.offset(place))
                done += sums
        return done

    def _block(self, place: Place, memory: _Memory) -> tuple[memoryview, Sums]:
        if self._unchanged:
            rows = place.matrix * self.rows
            found = self._read(rows + place.start, rows + place.stop)
            return memoryview(found.tobytes()), Sums()
        base = self.base_block(place, memory)
        if not self.change.steps:
            data = memory.stored(base, self.change.via)
            if _overflows(data, self.change.dtype) and np.isfinite(base).all():
                self._refuse(base)
            return data, Sums()
        weight = _inner(base, base)
        merged, update = self._merged(place, base, memory)
        square = _inner(update, update)
        data = memory.stored(merged, self.change.via)
        left = self._left(memory.decoded(data, merged), merged, update, square, place)
        if self._rounder is None or not math.isfinite(square):
            sums = Sums(weight, square, left=left)
        else:
            wanted = merged.astype(np.float32)
            data = self._shaped(self._rounder, wanted, data, place)
            stored = memory.decoded(data, merged)
            shaped = self._left(stored, merged, update, square, place)
            _, output = self._rounder.seen(update, place)
            sums = Sums(weight, square, output, shaped, left)
        if not math.isfinite(sums.left.kept):
            self._refuse(self.base_block(place))
        return data, sums

    def _left(
        self, stored: Array, merged: Array, update: Array, square: float, place: Place
    ) -> Left:
        """Return what `stored`, which is written over, has of an update whose ‖ΔW‖² is `square`.

        W' - W is ΔW and what rounding W + ΔW added to it, so one difference gives both sums.
        """
        stored -= merged
        seen = self._rounder.seen(stored, place) if self._rounder else ()
        return Left(square + _inner(stored, update), _inner(stored, stored), *seen)

    def _shaped(
        self, rounder: Rounder, wanted: Array, nearest: memoryview, place: Place
    ) -> memoryview:
        """Round with feedback, on the blocks of the base where it has the type."""
        starts = [np.frombuffer(nearest, np.uint8).reshape(len(wanted), -1)]
        if self.change.source.dtype is self.change.dtype:
            rows = place.matrix * self.rows
            found = self._read(rows + place.start, rows + place.stop)
            starts.insert(0, np.frombuffer(found.tobytes(), np.uint8).reshape(len(wanted), -1))
        return rounder.rounded(wanted, starts, place).reshape(-1).data

    def _merged(self, place: Place, base: Array, memory: _Memory) -> tuple[Array, Array]:
        """Return W + ΔW, perhaps in the memory of W, and ΔW of a block."""
        rows = len(base)
        match self._operations:
            case [Sum() | Rules() as only]:
                update = only.delta(place, memory.update[:rows])
                return np.add(base, update, out=base), update
            case several:
                merged = memory.other[:rows]
                np.copyto(merged, base)
                for operation in several:
                    merged = operation.apply(merged, base, place)
                return merged, np.subtract(merged, base, out=memory.update[:rows])

    def report(self, sums: Sums) -> TensorReport:
        """Return what the change did, from the sums of all blocks."""
        return TensorReport(
            tensor=self.change.name,
            modules=self.change.modules,
            stored=stored_type(self.change.source).value,
            dtype=self.change.dtype.value,
            relative_norm=(sums.update / sums.base) ** 0.5 if sums.base else None,
            survival=sums.left.kept / sums.update if sums.update else None,
            noise=(sums.left.noise / sums.update) ** 0.5 if sums.update else None,
            **(_compared(sums) if self.change.shaping and sums.update else {}),
        )

    def _refuse(self, base: Array) -> None:
        where = self.change.name
        if not np.isfinite(base).all():
            raise FormatError("the base holds NaN or infinity", where=where)
        raise UnsupportedError(
            f"a value does not fit {self.change.dtype}; store a wider type (--dtype, or "
            "--gguf-type for a GGUF base)",
            where=where,
        )

    def base_block(self, place: Place, memory: _Memory | None = None) -> Array:
        """Return the rows of the unmerged base, in `memory` if given; zeros below its last row."""
        height = place.stop - place.start
        rows = memory.base[:height] if memory else np.empty((height, self.columns), self.kind)
        have = self.change.source.size // (self.matrices * self.columns)
        stop = min(place.stop, have)
        start = min(place.start, stop)
        begin = place.matrix * have + start
        found = self._read(begin, begin + stop - start)
        np.copyto(rows[: stop - start], memory.read(found) if memory else found.numpy())
        rows[stop - start :] = 0
        return rows

    @property
    def _unchanged(self) -> bool:
        """Whether the rows of the source are those to store."""
        source, change = self.change.source, self.change
        return not change.steps and (source.dtype, source.shape) == (change.dtype, change.shape)

    @cached_property
    def _read(self) -> Callable[[int, int], LazyTensor]:
        return reader(self.change.source, self.columns)

    @cached_property
    def _rounder(self) -> Rounder | None:
        shaping = self.change.shaping
        return Rounder(self.change, shaping, self._operations) if shaping else None

    @cached_property
    def _operations(self) -> list[Operation]:
        return operations(self.change.steps, self)


class _Memory:
    """Arrays of a block's size that every block of a task uses again, as few as there can be."""

    def __init__(
        self, height: int, columns: int, kind: np.dtype[Any], dtype: DType, ranges: Ranges
    ) -> None:
        self.dtype, self.kind, self.ranges = dtype, kind, ranges
        self.base = np.empty((height, columns), kind)
        self.other = np.empty((height, columns), kind)
        self.update = np.empty((height, columns), kind)
        self._raw = bytearray()
        self._stored = None if dtype.quantised else np.empty((height, columns), dtype.numpy())

    def read(self, tensor: LazyTensor) -> Array:
        """Return a tensor's values, good until the next one is read."""
        span = tensor.read
        if not isinstance(span, FileSlice) or tensor.dtype.quantised:
            return tensor.numpy()
        if len(self._raw) < span.length:
            self._raw = bytearray(span.length)
        view = memoryview(self._raw)[: span.length]
        self.ranges.read(span, view)
        return np.frombuffer(view, tensor.dtype.numpy()).reshape(tensor.shape)

    def stored(self, values: Array, via: DType | None) -> memoryview:
        """Return the bytes of `values` in the stored type, rounded to `via` before if given."""
        if via is not None:
            values = _decoded_again(encode(values, via), via, values)
        if self._stored is None:
            return encode(values, self.dtype)
        stored = self._stored[: len(values)]
        np.copyto(stored, values, casting="unsafe")
        return stored.reshape(-1).view(np.uint8).data

    def decoded(self, data: memoryview, merged: Array) -> Array:
        """Return what the stored bytes hold, in the memory that `merged` is not in."""
        free = self.other if np.may_share_memory(merged, self.base) else self.base
        out = free[: len(merged)]
        held = self._stored[: len(out)] if self._stored is not None else None
        np.copyto(out, _decoded_again(data, self.dtype, out) if held is None else held)
        return out


def _decoded_again(data: memoryview, dtype: DType, like: Array) -> Array:
    return decoded(LazyTensor(dtype, like.shape, lambda: data), like.dtype)


def _geometry(change: Change) -> tuple[int, int, int]:
    """Return (matrices, rows, columns); a vector is one row."""
    shape = change.shape
    if len(shape) <= 1:
        return 1, 1, change.stored.size
    stacked = len(shape) == _STACK and any(
        isinstance(step, (Product, Ruled)) and step.pair.kind is Kind.EXPERTS
        for step in change.steps
    )
    matrices = shape[0] if stacked else 1
    rows = shape[1] if stacked else shape[0]
    if change.dtype.quantised or change.source.dtype.quantised:
        # Blocks run along the last axis only.
        rows = change.stored.size // (matrices * shape[-1])
    return matrices, rows, change.stored.size // (matrices * rows)


def _overflows(data: memoryview, dtype: DType) -> bool:
    """Tell whether numbers of 16 bits hold infinity or NaN, by their exponents."""
    if dtype not in _EXPONENT:
        return False
    exponents = np.frombuffer(data, np.uint16) & _EXPONENT[dtype]
    return bool(exponents.size and exponents.max() == _EXPONENT[dtype])


def _compared(sums: Sums) -> dict[str, Any]:
    """Return the fields of a report on shaped rounding."""
    left, nearest = sums.left, sums.nearest
    return {
        "rounding": "shaped",
        "direction_error": (left.own / sums.update) ** 0.5,
        "output_error": (left.output / sums.output) ** 0.5 if sums.output else None,
        "nearest": NearestReport(
            survival=nearest.kept / sums.update,
            noise=(nearest.noise / sums.update) ** 0.5,
            direction_error=(nearest.own / sums.update) ** 0.5,
            output_error=(nearest.output / sums.output) ** 0.5 if sums.output else None,
        ),
    }


def _inner(first: Array, second: Array) -> float:
    return float(np.dot(first.reshape(-1), second.reshape(-1)))


def total(parts: Iterable[Sums]) -> Sums:
    """Add up the sums of all blocks."""
    return sum(parts, start=Sums())
