"""Singular values of ΔW = scale · B · A, and the norms of its rows and columns, from the factors.

With R_A and R_B triangular, R_AᵀR_A = AAᵀ and R_BᵀR_B = BᵀB, the singular values of B·A are those
of the r x r matrix R_B·R_Aᵀ. All arithmetic is float64; B·A is never formed.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.model import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapterkit.model import Update
    from adapterkit.tensor import LazyTensor

Array = NDArray[np.float64]

# Cholesky factors of a Gram matrix lose twice the digits that QR does: the ratio of the extreme
# singular values from which QR takes over. Below it they are right to 1e-12 of the largest.
_GRAM_CONDITION = 1e3
# The σ₁ that rounding alone leaves where B·A vanishes exactly, over the norms of the factors.
_ROUNDING = 8 * 2.0**-52
# Squared norms between this and its inverse leave room for the products of two.
_SMALL = 1e-60
# Elements that are decoded at a time: both of their forms stay in the processor's cache.
_CHUNK = 1 << 15


@dataclass(frozen=True, slots=True)
class Factors:
    """The two factors of one matrix, decoded.

    Attributes:
        a: (r, in), float64.
        b: (out, r), float64.
        expert: number of the expert within its tensor; None without experts.
    """

    a: Array
    b: Array
    expert: int | None


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What the factors of one matrix say of ΔW = scale · B · A.

    Attributes:
        relative: (min(r, out, in),) singular values over the largest, descending; all zero for
            ΔW = 0. Kept apart from the size, so that no scale can underflow them.
        largest: σ₁ of ΔW, scale included.
        rows: (out,) energy of each row of B·A, up to a common factor.
        columns: (in,) energy of each column of B·A, up to a common factor.
        balance: ‖A‖ / ‖B‖, Frobenius; None if B is zero.
        expert: number of the expert within its tensor; None without experts.
    """

    relative: Array
    largest: float
    rows: Array
    columns: Array
    balance: float | None
    expert: int | None

    @property
    def values(self) -> Array:
        """Singular values of ΔW, scale included, descending."""
        return self.relative * self.largest


class _Scratch(threading.local):
    """Room for matrices, one set for each thread, filled anew for every pair.

    To a process, memory that it gave back is new memory: its first use takes longer than the sums.
    """

    def __init__(self) -> None:
        self._rooms: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return an array that is good until the same name is asked for again."""
        size = math.prod(shape)
        room = self._rooms.get(name)
        if room is None or room.size < size:
            room = self._rooms[name] = np.empty(size)
        return room[:size].reshape(shape)


_SCRATCH = _Scratch()


def factors(pair: Update) -> Iterator[Factors]:
    """Yield the factors of each matrix of a pair, experts one by one."""
    return _factors(pair, lambda _, shape: np.empty(shape))


def _factors(pair: Update, room: Callable[[str, tuple[int, ...]], Array]) -> Iterator[Factors]:
    # Stored values stay as they are until their expert's turn: float64 is four times as large.
    for expert, (b_one, a_one) in enumerate(pair.matrices(_stored)):
        yield Factors(
            _widened(a_one, pair.a.dtype, room("a", a_one.shape)),
            _widened(b_one, pair.b.dtype, room("b", b_one.shape)),
            expert if pair.kind is Kind.EXPERTS else None,
        )


def _stored(tensor: LazyTensor) -> np.ndarray[Any, Any]:
    if tensor.dtype is DType.BF16:
        return np.frombuffer(tensor.tobytes(), dtype="<u2")
    return tensor.numpy()


def _widened(values: np.ndarray[Any, Any], dtype: DType, out: Array) -> Array:
    if dtype is not DType.BF16:
        out[...] = values
        return out
    # bf16 is the upper half of float32; through ml_dtypes the same takes four times as long.
    narrow, wide = values.reshape(-1), out.reshape(-1)
    part = np.empty(min(_CHUNK, narrow.size), np.uint32)
    for start in range(0, narrow.size, _CHUNK):
        stored = narrow[start : start + _CHUNK]
        part = part[: stored.size]
        part[...] = stored
        part <<= 16
        wide[start : start + _CHUNK] = part.view(np.float32)
    return out


def spectra(pair: Update) -> list[Spectrum]:
    """Return the spectrum of each matrix of a pair, experts one by one.

    Raises:
        FormatError: if a factor holds NaN or infinity.
    """
    return [_spectrum(each, pair) for each in _factors(pair, _SCRATCH.array)]


def _spectrum(each: Factors, pair: Update) -> Spectrum:
    a, a_size = _unit(each.a)
    b, b_size = _unit(each.b)
    if not math.isfinite(a_size + b_size):
        raise not_finite(pair)
    r_a, r_b = _triangulars(a, b)
    a_norm, b_norm = float(np.linalg.norm(r_a)), float(np.linalg.norm(r_b))
    core = r_b @ r_a.T
    values: Array = np.asarray(np.linalg.svd(core, compute_uv=False), dtype=np.float64)
    top = float(values[0])
    # A zero update is one whose factors cancel to the last bit, not one that is merely small.
    zero = not pair.scale or not a_size or not b_size or top <= _ROUNDING * a_norm * b_norm
    relative = np.zeros_like(values) if zero else values / top
    return Spectrum(
        relative,
        0.0 if zero else top * a_size * b_size * abs(pair.scale),
        np.zeros_like(b[:, 0]) if zero else _energies(a=r_a.T, b=b, axis=1),
        np.zeros_like(a[0]) if zero else _energies(a=a, b=r_b, axis=0),
        a_norm * a_size / (b_norm * b_size) if b_norm * b_size else None,
        each.expert,
    )


def _energies(a: Array, b: Array, axis: int) -> Array:
    """Return the squared norms of the columns (axis 0) or rows (axis 1) of a product b @ a."""
    product = np.matmul(b, a, out=_SCRATCH.array("product", (b.shape[0], a.shape[1])))
    sums = np.einsum("ij,ij->j" if axis == 0 else "ij,ij->i", product, product)
    return np.asarray(sums, dtype=np.float64)


def _unit(matrix: Array) -> tuple[Array, float]:
    """Return a matrix whose squares neither overflow nor vanish, and the power of two divided by.

    The second is 0 for a zero matrix, and not finite for a matrix that is not.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(np.vdot(matrix, matrix))
    if _SMALL < squared < 1 / _SMALL:
        return matrix, 1.0
    largest = float(max(matrix.max(), -matrix.min()))
    if not math.isfinite(largest) or not largest:
        return matrix, largest
    size = math.ldexp(1.0, math.frexp(largest)[1])
    return matrix / size, size


def _triangulars(a: Array, b: Array) -> tuple[Array, Array]:
    """Return R_A and R_B of `triangular`, by half of its calls where both are well conditioned."""
    if min(a.shape[1], b.shape[0]) > len(a):
        lower = _cholesky(np.stack((a @ a.T, b.T @ b)))
        if lower is not None:
            return lower[0].T, lower[1].T
    return triangular(a.T), triangular(b)


def triangular(matrix: Array) -> Array:
    """Return R (min(n, r), r) with RᵀR = XᵀX for X (n, r).

    The Cholesky factor of XᵀX where X is well conditioned, else that of a QR decomposition.
    """
    if matrix.shape[0] > matrix.shape[1]:
        lower = _cholesky(matrix.T @ matrix)
        if lower is not None:
            return lower.T
    return np.asarray(np.linalg.qr(matrix, mode="r"), dtype=np.float64)


def _cholesky(gram: Array) -> Array | None:
    """Return L (..., r, r) with L·Lᵀ = XᵀX (..., r, r), or None if an X is ill conditioned."""
    try:
        lower = np.asarray(np.linalg.cholesky(gram), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    values = np.linalg.svd(lower, compute_uv=False)
    return lower if (values[..., -1] * _GRAM_CONDITION > values[..., 0]).all() else None


def not_finite(pair: Update) -> FormatError:
    """Return the error for a pair of which a factor is not finite; names that factor."""
    from adapterkit.delta import all_finite

    factor = "A" if not all_finite(pair.a) else "B"
    message = f"factor {factor} holds NaN or infinity; this adapter is broken, a diverged run?"
    return FormatError(message, where=pair.module)
