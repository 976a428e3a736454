"""The difference of two stored matrices, and what of it is the rounding of the stored type.

Both are read in blocks of rows. A difference that is small enough is kept; a larger one is computed
anew in every pass, so that memory is a block whatever the size of the matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from adapterkit.dtype import DType
from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.lowrank.operators import Plane
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

Bytes: TypeAlias = bytes | bytearray | memoryview

# Elements of a block of rows, and bytes up to which a difference is held.
_BLOCK = 1 << 18
_HELD = 1 << 25
# Bits of the mantissa after its leading one.
_MANTISSA = {DType.F64: 52, DType.F32: 23, DType.F16: 10, DType.BF16: 7}
_LEAST_F16 = 2.0**-14
# Q8_0 rounds 32 values at a time to whole multiples of the largest / 127.
_LEVELS = 127
# Variance of computing an update of up to a hundred ranks, in units² / 12 of the update itself.
_ARITHMETIC = 12 * (100 / 6) / 4
_WIDE = frozenset({DType.F32, DType.F64})


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix in a checkpoint.

    Attributes:
        parts: some rows of it each, one below the other, as their files hold them.
        path: the checkpoint.
        name: what messages call it.
    """

    parts: tuple[LazyTensor, ...]
    path: Path
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        heights = [part.size // max(width(part), 1) for part in self.parts]
        return sum(heights), width(self.parts[0])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(part.nbytes for part in self.parts)

    @property
    def dtypes(self) -> frozenset[DType]:
        """Stored types."""
        return frozenset(part.dtype for part in self.parts)

    def rows(self, begin: int, end: int) -> list[LazyTensor]:
        """Return the rows of a block, from all parts that it touches, read once."""
        found: list[LazyTensor] = []
        top = 0
        for part in self.parts:
            height = part.size // max(width(part), 1)
            first, last = max(begin - top, 0), min(end - top, height)
            if first < last:
                rows = part.rows(first, last)
                found.append(LazyTensor(rows.dtype, rows.shape, partial(_given, rows.tobytes())))
            top += height
        return found

    def values(self, rows: Sequence[LazyTensor], kind: np.dtype[Any]) -> Array:
        """Return the rows of a block as numbers.

        Raises:
            UnsupportedError: if they are quantised in a way that nothing here decodes.
        """
        try:
            decoded = [part.numpy().astype(kind) for part in rows]
        except NotImplementedError:
            kinds = ", ".join(sorted(self.dtypes))
            message = f"is stored as {kinds}, which cannot be decoded here"
            raise UnsupportedError(message, path=self.path, where=self.name) from None
        return decoded[0] if len(decoded) == 1 else np.concatenate(decoded)


def _given(data: Bytes) -> Bytes:
    return data


def width(tensor: LazyTensor) -> int:
    """Return the columns of a tensor; a single number is one column."""
    return tensor.shape[-1] if tensor.shape else 1


@dataclass(frozen=True, slots=True)
class Difference:
    """ΔW = W_tuned - W_base of one matrix.

    Attributes:
        plane: ΔW, to be read in passes.
        streamed: the same, computed from the files in every pass.
        norm: ‖ΔW‖, Frobenius, summed in float64.
        base_norm: ‖W_base‖.
        rounding: ‖E‖, where E is the rounding of W_tuned to its stored type: its entries are
            uniform within half a unit in the last place, so their variance is that unit² / 12. An
            entry that did not change lost its whole update, which is not more than the mean square
            of its row. Of Q8_0 the unit is a block's step. 0 for other quantised types, of which it
            is not known.
        edge: largest singular value to expect of E and of the arithmetic of the update, max √(Σ
            variance of a row) + max √(Σ variance of a column) (Bandeira and van Handel 2016); rms ·
            (√rows + √columns) where all entries are alike.
    """

    plane: Plane
    streamed: Plane
    norm: float
    base_norm: float
    rounding: float
    edge: float


def differ(base: Stored, tuned: Stored) -> bool:
    """Tell whether anything differs: bytes are compared, where both have one type."""
    return any(
        not _same(base.rows(begin, end), tuned.rows(begin, end))
        for begin, end in _blocks(base.shape)
    )


def difference(base: Stored, tuned: Stored) -> Difference:
    """Return the difference of two matrices of one shape.

    It is computed in float64 if either is stored in 32 bits or more, else in float32, which holds
    differences of 16-bit numbers to 1e-7.

    Raises:
        FormatError: if either holds NaN or infinity.
        UnsupportedError: if a quantised type cannot be decoded.
    """
    shape = base.shape
    wide = not _WIDE.isdisjoint(base.dtypes | tuned.dtypes)
    kind = np.dtype(np.float64 if wide else np.float32)
    read = partial(_read, base, tuned, kind)
    held = np.empty(shape, kind) if math.prod(shape) * kind.itemsize <= _HELD else None
    rounding = _Rounding(shape, tuned)
    norm = base_norm = 0.0
    for begin, end in _blocks(shape):
        rows = base.rows(begin, end), tuned.rows(begin, end)
        # What is not finite is looked for in the sums, and refused by name.
        with np.errstate(over="ignore", invalid="ignore"):
            old = base.values(rows[0], kind)
            new = old if _same(*rows) else tuned.values(rows[1], kind)
            delta = new - old
        squares = _squared(delta), _squared(old)
        if not math.isfinite(sum(squares)):
            _refuse(base, tuned, old)
        norm, base_norm = norm + squares[0], base_norm + squares[1]
        if squares[0]:
            rounding.add(begin, new, delta)
        if held is not None:
            held[begin:end] = delta
    streamed = Plane(shape, read)
    return Difference(
        plane=streamed if held is None else Plane(shape, partial(_held, held)),
        streamed=streamed,
        norm=norm**0.5,
        base_norm=base_norm**0.5,
        rounding=rounding.norm,
        edge=rounding.edge,
    )


def _blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    height = max(1, _BLOCK // max(1, shape[1]))
    for begin in range(0, shape[0], height):
        yield begin, min(begin + height, shape[0])


def _read(base: Stored, tuned: Stored, kind: np.dtype[Any]) -> Iterator[Array]:
    for begin, end in _blocks(base.shape):
        new = tuned.values(tuned.rows(begin, end), kind)
        yield new - base.values(base.rows(begin, end), kind)


def _held(whole: Array) -> Iterator[Array]:
    for begin, end in _blocks((whole.shape[0], whole.shape[1])):
        yield whole[begin:end]


def _same(old: Sequence[LazyTensor], new: Sequence[LazyTensor]) -> bool:
    kinds = {part.dtype for part in (*old, *new)}
    return len(kinds) == 1 and _bytes(old) == _bytes(new)


def _bytes(rows: Sequence[LazyTensor]) -> Bytes:
    return rows[0].tobytes() if len(rows) == 1 else b"".join(part.tobytes() for part in rows)


def _squared(block: Array) -> float:
    # An overflow is looked for in the result.
    with np.errstate(all="ignore"):
        flat = block.reshape(-1).astype(np.float64, copy=False)
        return float(np.dot(flat, flat))


def _refuse(base: Stored, tuned: Stored, old: Array) -> None:
    broken = tuned if np.isfinite(old).all() else base
    message = "holds NaN or infinity; is the model broken, a diverged training run?"
    raise FormatError(message, path=broken.path, where=broken.name)


class _Rounding:
    """Sums of the variance that rounding to the stored type has, by row and by column.

    In 32 bits and more, whoever computed the update left about as much: B · A over r ranks rounds
    like √(r / 6) units of the update itself.
    """

    def __init__(self, shape: tuple[int, int], tuned: Stored) -> None:
        bits = [_MANTISSA.get(dtype) for dtype in tuned.dtypes]
        known = [each for each in bits if each is not None]
        self.unit = 2.0 ** -min(known) if len(known) == len(bits) else 0.0
        self.blocks = tuned.dtypes == frozenset({DType.Q8_0})
        if self.blocks:
            self.unit = 1.0 / _LEVELS
        self.least = _LEAST_F16 if DType.F16 in tuned.dtypes else 0.0
        self.computed = not _WIDE.isdisjoint(tuned.dtypes)
        self.rows, self.columns = np.zeros(shape[0]), np.zeros(shape[1])
        self.total = 0.0

    def add(self, begin: int, values: Array, delta: Array) -> None:
        if not self.unit:
            return
        powers = _largest(values) if self.blocks else _powers(values)
        if self.least:
            powers = np.maximum(powers, powers.dtype.type(self.least))
        squares = _by_row(delta)
        lost = (np.sqrt(12 * squares / delta.shape[1]) / self.unit).astype(powers.dtype)
        powers = np.where(delta != 0, powers, np.minimum(powers, lost[:, None]))
        rows = _by_row(powers)
        self.total += float(rows.sum())
        self.columns += _by_column(powers)
        if self.computed:
            rows = rows + _ARITHMETIC * squares
            self.columns += _ARITHMETIC * _by_column(delta)
        self.rows[begin : begin + len(values)] = rows

    @property
    def norm(self) -> float:
        return self.unit * (self.total / 12) ** 0.5

    @property
    def edge(self) -> float:
        largest = np.sqrt(self.rows.max(initial=0.0)) + np.sqrt(self.columns.max(initial=0.0))
        return float(self.unit * largest / 12**0.5)


def _by_row(block: Array) -> Array:
    return np.einsum("ij,ij->i", block, block)


def _by_column(block: Array) -> Array:
    return np.einsum("ij,ij->j", block, block)


def _largest(values: Array) -> Array:
    """Return for each value the largest magnitude of its block of 32 in a row."""
    blocks = np.abs(values).reshape(len(values), -1, DType.Q8_0.block)
    return np.repeat(blocks.max(axis=2), DType.Q8_0.block, axis=1)


def _powers(values: Array) -> Array:
    """Return the power of two at or below each magnitude: its bits without sign and mantissa."""
    if values.dtype == np.float64:
        return (values.view(np.uint64) & np.uint64(0x7FF0 << 48)).view(np.float64)
    return (values.view(np.uint32) & np.uint32(0x7F80 << 16)).view(np.float32)
