"""Updates as pairs of float64 factors: read from stored tensors, added, rounded once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from adapterkit.dtype import DType
from adapterkit.errors import UncheckableError
from adapterkit.model import Kind
from adapterkit.tensor import LazyTensor, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from adapterkit.model import Update

Array: TypeAlias = NDArray[np.float64]
# Seed and place, from which what is drawn at random follows.
Key: TypeAlias = tuple[int, int]

# Squared norms between this and its inverse leave room for the products of two.
SMALL = 1e-60
# Factors and updates of such sizes leave float64 room for squares, sums and weights.
_LEAST, _MOST = 1e-100, 1e100
# Elements that are decoded at a time: both of their forms stay in the processor's cache.
_CHUNK = 1 << 15


@dataclass(frozen=True, slots=True)
class LowRank:
    """One update ΔW = B · A of unit scale, or a stack of them.

    Attributes:
        b: (out, r), float64, the scale included; of a stack (E, out, r).
        a: (r, in), float64; of a stack (E, r, in).
        scale: the multiplier that `b` includes; only a rule that looks at the factors themselves,
            and so depends on their basis, needs it.
    """

    b: Array
    a: Array
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Inner dimension; 0 for an update that is not there."""
        return self.b.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update."""
        return self.b.shape[-2], self.a.shape[-1]

    @property
    def turned(self) -> LowRank:
        """The transposed update, such as that of a table whose rows are columns of B · A."""
        return LowRank(self.a.T, self.b.T, self.scale)


def nothing(shape: tuple[int, int]) -> LowRank:
    """Return a zero update of rank 0."""
    return LowRank(np.zeros((shape[0], 0)), np.zeros((0, shape[1])))


def stacked(updates: Sequence[LowRank], coefficients: Sequence[float]) -> LowRank:
    """Return Σ cᵢ ΔWᵢ exactly, with rank Σ rᵢ: B = [c₁B₁ … c_TB_T], A = [A₁; …; A_T]."""
    return LowRank(
        np.concatenate([u.b * c for u, c in zip(updates, coefficients, strict=True)], axis=-1),
        np.concatenate([u.a for u in updates], axis=-2),
    )


def factors(
    pair: Update, room: Callable[[str, tuple[int, ...]], Array] | None = None
) -> Iterator[LowRank]:
    """Yield the factors of each matrix as they are stored, the scale left out; experts one by one.

    Args:
        pair: the update.
        room: gives memory for a factor, by its name and shape; new memory if omitted.
    """
    # Stored values stay as they are until their expert's turn: float64 is four times as large.
    for b, a in pair.matrices(_stored):
        wide_a, wide_b = (
            _widened(values, tensor.dtype, room(name, values.shape) if room else None)
            for values, tensor, name in ((a, pair.a, "a"), (b, pair.b, "b"))
        )
        yield LowRank(wide_b, wide_a)


def unscaled(pair: Update, least: float = _LEAST) -> Iterator[LowRank]:
    """Yield the factors of each matrix, the scale left out; experts one by one.

    Raises:
        UncheckableError: if float64 has no room for what is computed from them.
    """
    for each in factors(pair):
        yield _with_room(each, pair, least)


def updates(pair: Update, least: float = _LEAST) -> Iterator[LowRank]:
    """Yield the update of each matrix, scale included; experts one by one.

    Raises:
        UncheckableError: as `unscaled`.
    """
    for each in unscaled(pair, least):
        yield _scaled(each, pair)


def whole(pair: Update) -> LowRank:
    """Return the updates of all matrices at once, as a stack; the scale included.

    Raises:
        UncheckableError: as `unscaled`.
    """
    return _scaled(_with_room(LowRank(*pair.stacked(wide)), pair), pair)


def scaled(stored: LowRank, scale: float) -> LowRank:
    """Return an update with its scale in B."""
    if scale == 1:
        return stored
    # What is infinite times 0 is no number, and shows itself.
    with np.errstate(invalid="ignore"):
        return LowRank(stored.b * scale, stored.a, scale)


def _scaled(stored: LowRank, pair: Update) -> LowRank:
    """Return an update with its scale in B, in the memory that widening B took."""
    if pair.scale == 1 or pair.b.dtype is DType.F64:
        return scaled(stored, pair.scale)
    b = stored.b
    with np.errstate(invalid="ignore"):
        b *= pair.scale
    return LowRank(b, stored.a, pair.scale)


def _with_room(stored: LowRank, pair: Update, least: float = _LEAST) -> LowRank:
    """Return factors as they are; zeros need no room, and what is not finite shows itself."""
    sizes = [_size(stored.b), _size(stored.a), abs(pair.scale)]
    if not all(sizes) or not all(map(math.isfinite, sizes)):
        return stored
    orders = [math.log10(size) for size in (*sizes[:2], 1.0)]
    orders[2] = sum(map(math.log10, sizes))
    if (not least or math.log10(least) < min(orders)) and max(orders) < math.log10(_MOST):
        return stored
    b, a, whole = (f"1e{order:+.0f}" for order in orders)
    message = (
        f"B is of the order of {b}, A of {a} and the update of {whole}; what lies beyond "
        f"{_LEAST:g} to {_MOST:g} leaves float64 no room to compute with"
    )
    raise UncheckableError(message, where=pair.module)


def _size(matrix: Array) -> float:
    """Return the norm, which one fast pass gives, or where its square is none the largest entry."""
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(np.vdot(matrix, matrix))
    return math.sqrt(squared) if SMALL < squared < 1 / SMALL else _largest(matrix)


def _largest(matrix: Array) -> float:
    return float(max(matrix.max(initial=0.0), -matrix.min(initial=0.0)))


def expert(pair: Update, place: int) -> int | None:
    """Return the number of an expert by its place among the matrices; None without experts."""
    return place if pair.kind is Kind.EXPERTS else None


def wide(tensor: LazyTensor) -> Array:
    """Return the values in float64; what is stored so is not copied."""
    return _widened(_stored(tensor), tensor.dtype, None).reshape(tensor.shape)


def stored(values: Array, dtype: DType) -> LazyTensor:
    """Round once and keep only the rounded bytes."""
    data = encode(values, dtype)
    return LazyTensor(dtype, values.shape, lambda: data)


def unit(matrix: Array) -> tuple[Array, float]:
    """Return a matrix whose squares neither overflow nor vanish, and the power of two divided by.

    The second is 0 for a zero matrix, and not finite for a matrix that is not.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(np.vdot(matrix, matrix))
    if SMALL < squared < 1 / SMALL:
        return matrix, 1.0
    largest = _largest(matrix)
    if not math.isfinite(largest) or not largest:
        return matrix, largest
    size = math.ldexp(1.0, math.frexp(largest)[1] - 1)
    return matrix / size, size


def _stored(tensor: LazyTensor) -> np.ndarray[Any, Any]:
    if tensor.dtype is DType.BF16:
        return np.frombuffer(tensor.tobytes(), dtype="<u2")
    return tensor.numpy()


def _widened(values: np.ndarray[Any, Any], dtype: DType, out: Array | None) -> Array:
    if dtype is not DType.BF16:
        # A NaN that signals is one all the same.
        with np.errstate(invalid="ignore"):
            if out is None:
                return np.asarray(values, dtype=np.float64)
            out[...] = values
        return out
    # bf16 is the upper half of float32; through ml_dtypes the same takes four times as long.
    result = out if out is not None else np.empty(values.shape, np.float64)
    narrow, flat = values.reshape(-1), result.reshape(-1)
    part = np.empty(min(_CHUNK, narrow.size), np.uint32)
    for start in range(0, narrow.size, _CHUNK):
        chunk = narrow[start : start + _CHUNK]
        part = part[: chunk.size]
        part[...] = chunk
        part <<= 16
        flat[start : start + _CHUNK] = part.view(np.float32)
    return result
