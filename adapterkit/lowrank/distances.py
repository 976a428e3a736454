"""Norms, distances and inner products of updates, from r x r products of their factors.

With G_B = BᵀB and G_A = AAᵀ, ‖BA‖² = Σ G_B ∘ G_A, and ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ). A sum of
squares whose terms cancel is taken from orthogonal decompositions instead: every norm and distance
is right to 1e-12 of itself, or to 1e-15 of ‖B‖ ‖A‖ where B · A is what such products leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from adapterkit.lowrank.decomposition import orthogonal_triangle
from adapterkit.lowrank.products import SMALL, LowRank, stacked, unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.lowrank.products import Array

# A sum, and that of its terms' magnitudes.
_Sum: TypeAlias = tuple[float, float]

# A sum of at least this share of its terms' magnitudes has lost three digits of sixteen.
_CLEAR = 1e-3
# Factors nearer than this share of their squares are compared entry by entry.
_NEAR = 1e-4
# Directions of A with less than this share of the largest square are not solved for.
_DEPENDENT = 1e-6


def inner(first: LowRank, second: LowRank) -> float:
    """Return ⟨ΔW₁, ΔW₂⟩; NaN if a factor is not finite."""
    return _sum(first, second)[0]


def gram(updates: Sequence[LowRank]) -> Array:
    """Return the (T, T) matrix of inner products ⟨ΔWᵢ, ΔWⱼ⟩."""
    count = len(updates)
    found = np.zeros((count, count))
    for i, first in enumerate(updates):
        for j, second in enumerate(updates[: i + 1]):
            found[i, j] = found[j, i] = inner(first, second)
    return found


def norm(update: LowRank) -> float:
    """Return ‖ΔW‖, Frobenius, of a stack that of all together; NaN if a factor is not finite."""
    return _root(*_square(update), update)


def distance(first: LowRank, second: LowRank) -> float:
    """Return ‖ΔW₁ - ΔW₂‖, Frobenius; NaN if a factor is not finite."""
    return measured(first, second).distance


@dataclass(frozen=True, slots=True)
class Measured:
    """Two updates: ‖ΔW₁‖, ‖ΔW₂‖, ⟨ΔW₁, ΔW₂⟩ and ‖ΔW₁ - ΔW₂‖."""

    norms: tuple[float, float]
    inner: float
    distance: float


def measured(first: LowRank, second: LowRank) -> Measured:
    """Return all that two updates say of each other.

    The distance is that of their inner products where those do not cancel. Else ΔW₁ - ΔW₂ is
    written by what is small already: (B₁ - B₂S) A₁ - B₂ (A₂ - S A₁).
    """
    one, other, cross = _sums(first, second)
    norms = _root(*one, first), _root(*other, second)
    apart = _far(one, other, cross)
    if apart is None and math.isfinite(one[1] + other[1]):
        first, second = _near(first, second)
        apart = _far(*_sums(first, second))
    if apart is None:
        apart = _orthogonal_norm(stacked([first, second], [1.0, -1.0]))
    return Measured(norms, cross[0], apart)


def _near(first: LowRank, second: LowRank) -> tuple[LowRank, LowRank]:
    """Return two small updates of the same difference.

    S comes by least squares, or is the identity where the factors themselves are close.
    """
    if first.rank == second.rank:
        a = second.a - first.a
        if np.vdot(a, a) <= _NEAR * np.vdot(first.a, first.a):
            return LowRank(first.b - second.b, first.a), LowRank(second.b, a)
    inverse = np.linalg.pinv(first.a @ _t(first.a), rcond=_DEPENDENT, hermitian=True)
    solution = second.a @ _t(first.a) @ inverse
    b, a = first.b - second.b @ solution, second.a - solution @ first.a
    return LowRank(b, first.a), LowRank(second.b, a)


def _sums(first: LowRank, second: LowRank) -> tuple[_Sum, _Sum, _Sum]:
    return _square(first), _square(second), _sum(first, second)


def _far(one: _Sum, other: _Sum, cross: _Sum) -> float | None:
    """Return √(‖x‖² + ‖y‖² - 2⟨x, y⟩); None where that cancels."""
    squared = one[0] + other[0] - 2 * cross[0]
    return squared**0.5 if squared >= _CLEAR * (one[1] + other[1] + 2 * cross[1]) else None


def _sum(first: LowRank, second: LowRank) -> _Sum:
    """Return ⟨ΔW₁, ΔW₂⟩ and the sum of its terms' magnitudes."""
    return _added(*_products(first, second))


def _square(update: LowRank) -> _Sum:
    """Return ‖ΔW‖² and the sum of its terms' magnitudes; NaN where a square is no number."""
    if not update.a.any() or not update.b.any():
        return 0.0, 0.0
    left, right = _products(update, update)
    with np.errstate(all="ignore"):
        sizes = [float(np.trace(each, axis1=-2, axis2=-1).sum()) for each in (left, right)]
    sound = all(SMALL < size < 1 / SMALL for size in sizes)
    return _added(left, right) if sound else (math.nan, math.nan)


def _products(first: LowRank, second: LowRank) -> tuple[Array, Array]:
    with np.errstate(all="ignore"):
        return _t(first.b) @ second.b, first.a @ _t(second.a)


def _added(left: Array, right: Array) -> _Sum:
    with np.errstate(all="ignore"):
        products = left * right
        return float(products.sum()), float(np.abs(products).sum())


def _root(squared: float, bound: float, update: LowRank) -> float:
    return squared**0.5 if squared >= _CLEAR * bound else _orthogonal_norm(update)


def _orthogonal_norm(update: LowRank) -> float:
    b, b_size = unit(update.b)
    a, a_size = unit(update.a)
    if not b_size or not a_size:
        return b_size * a_size
    if not math.isfinite(b_size + a_size):
        return math.nan
    core = orthogonal_triangle(b) @ _t(orthogonal_triangle(_t(a)))
    return float(np.linalg.norm(core)) * b_size * a_size


def _t(matrices: Array) -> Array:
    return matrices.swapaxes(-1, -2)
