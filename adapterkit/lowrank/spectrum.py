"""Singular values of ΔW = scale · B · A, and the norms of its rows and columns, from the factors.

With R_A and R_B triangular, R_AᵀR_A = AAᵀ and R_BᵀR_B = BᵀB, the singular values of B·A are those
of the r x r matrix R_B·R_Aᵀ. All arithmetic is float64; B·A is never formed.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.errors import FormatError, UncheckableError
from adapterkit.lowrank.decomposition import triangles
from adapterkit.lowrank.differences import all_finite
from adapterkit.lowrank.products import Array, LowRank, expert, factors, unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.model import Update

# The σ₁ that rounding alone leaves where B·A vanishes exactly, over the norms of the factors.
_ROUNDING = 8 * 2.0**-52
# Thousands of squares of this have a sum.
_LARGEST = 1e150
# A share is reached to rounding.
_SLACK = 1e-12


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


def spectra(pair: Update) -> list[Spectrum]:
    """Return the spectrum of each matrix of a pair, experts one by one.

    Raises:
        FormatError: if a factor holds NaN or infinity.
        UncheckableError: if σ₁ has no square in float64.
    """
    found = enumerate(factors(pair, _SCRATCH.array))
    return [_spectrum(each, pair, expert(pair, place)) for place, each in found]


def _spectrum(each: LowRank, pair: Update, number: int | None) -> Spectrum:
    a, a_size = unit(each.a)
    b, b_size = unit(each.b)
    if not math.isfinite(a_size + b_size):
        raise not_finite(pair)
    r_b, r_a = triangles(LowRank(b, a))
    a_norm, b_norm = float(np.linalg.norm(r_a)), float(np.linalg.norm(r_b))
    core = r_b @ r_a.T
    values: Array = np.asarray(np.linalg.svd(core, compute_uv=False), dtype=np.float64)
    top = float(values[0])
    largest = top * a_size * b_size * abs(pair.scale)
    if not largest < _LARGEST:
        message = f"σ₁ is of the order of {largest:.0e}; float64 has no room for its square"
        raise UncheckableError(message, where=pair.module)
    # A zero update is one whose factors cancel to the last bit, not one that is merely small.
    zero = not pair.scale or not a_size or not b_size or top <= _ROUNDING * a_norm * b_norm
    relative = np.zeros_like(values) if zero else values / top
    return Spectrum(
        relative,
        0.0 if zero else largest,
        np.zeros_like(b[:, 0]) if zero else _energies(a=r_a.T, b=b, axis=1),
        np.zeros_like(a[0]) if zero else _energies(a=a, b=r_b, axis=0),
        a_norm * a_size / (b_norm * b_size) if b_norm * b_size else None,
        number,
    )


def _energies(a: Array, b: Array, axis: int) -> Array:
    """Return the squared norms of the columns (axis 0) or rows (axis 1) of a product b @ a."""
    product = np.matmul(b, a, out=_SCRATCH.array("product", (b.shape[0], a.shape[1])))
    sums = np.einsum("ij,ij->j" if axis == 0 else "ij,ij->i", product, product)
    return np.asarray(sums, dtype=np.float64)


def not_finite(pair: Update) -> FormatError:
    """Return the error for a pair of which a factor is not finite; names that factor."""
    factor = "A" if not all_finite(pair.a) else "B"
    message = f"factor {factor} holds NaN or infinity; this adapter is broken, a diverged run?"
    return FormatError(message, where=pair.module)


def energy_ranks(values: Array, levels: Sequence[float]) -> list[int]:
    """Return the fewest leading directions that hold each of some shares of Σσ².

    Args:
        values: σ, or σ over any common factor, descending, not all zero.
        levels: shares between 0 and 1.
    """
    share: Array = np.cumsum(values**2, dtype=np.float64)
    total = float(share[-1])
    return [int(share.searchsorted((level - _SLACK) * total)) + 1 for level in levels]
