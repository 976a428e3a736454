"""Norms, distances and inner products of updates, from r x r products of their factors.

With G_B = BᵀB and G_A = AAᵀ, ‖BA‖² = Σ G_B ∘ G_A, and ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ). A sum of
squares whose terms cancel is taken from orthogonal decompositions instead: every norm and distance
is right to 1e-12 of itself, or to 1e-15 of ‖B‖ ‖A‖ where B · A is what such products leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from adapterkit.lowrank.decomposition import orthogonal_triangle
from adapterkit.lowrank.products import SMALL, Array, LowRank, stacked, unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.lowrank.decomposition import Decomposition

# A sum, and that of its terms' magnitudes.
_Sum: TypeAlias = tuple[float, float]

# A sum of at least this share of its terms' magnitudes has lost three digits of sixteen.
_CLEAR = 1e-3
# Factors nearer than this share of their squares are compared entry by entry.
_NEAR = 1e-4
# Directions of A with less than this share of the largest square are not solved for.
_DEPENDENT = 1e-6
# Rounding to 32 bits or fewer leaves more than this share of an update, ...
_ROUNDED = 1e-9
# ... beside which what float64 left of a decomposition is nothing, ...
_NEGLIGIBLE = 1e-6
# ... and so is a term of this share of the square.
_VANISHING = 1e-12
# A number drawn from a normal distribution is never so many standard deviations off.
_DEVIATIONS = 8


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


def cut_distance(whole: Decomposition, cut: LowRank, kept: LowRank, predicted: float) -> float:
    """Return ‖ΔW - kept‖, Frobenius, where `kept` is a truncation of ΔW after rounding.

    What rounding moves is measured from the truncation itself, whose factors it is near to, and
    added to what the truncation leaves out: N = ΔW - cut is orthogonal to every update that has
    the rows or the columns of the cut. A random direction vouches that the cut is what it is said
    to be; where it does not, or float64 has rounded as much as the factors, ΔW itself is compared.

    Args:
        whole: the decomposition of ΔW.
        cut: its leading part in balanced factors (`Decomposition.factors`), before rounding.
        kept: the factors of `cut`, rounded.
        predicted: ‖N‖ (`ranks.predicted_error`).
    """
    b, a = cut.b - kept.b, cut.a - kept.a
    with np.errstate(all="ignore"):
        left, right = (cut.b.T @ b, b.T @ b), (cut.a @ a.T, a @ a.T)
        moved = _moved(cut, left, right)
    if moved is None or moved < _ROUNDED * whole.norm:
        return distance(whole.update, kept)
    along = _direction(cut.shape[1])
    lacking = whole.update.b @ (whole.update.a @ along) - cut.b @ (cut.a @ along)
    if not np.linalg.norm(lacking) <= _DEVIATIONS * predicted + _NEGLIGIBLE * moved:
        return distance(whole.update, kept)
    squared = predicted**2 + moved**2
    both, _ = _added(left[1], right[1])
    if predicted * max(both, 0.0) ** 0.5 > _VANISHING * squared:
        # Of what rounding moves, N meets b · a alone, and the cut's share of that is known.
        squared -= 2 * (inner(whole.update, LowRank(b, a)) - _added(left[0], right[0])[0])
    return squared**0.5


def _moved(cut: LowRank, left: tuple[Array, Array], right: tuple[Array, Array]) -> float | None:
    """Return ‖b A + (B - b) a‖ from Bᵀb and bᵀb, Aaᵀ and aaᵀ; None where squares do not tell.

    The columns of B, and the rows of A, are orthogonal.
    """
    (b_mixed, b_small), (a_mixed, a_small) = left, right
    if not (_squares(_trace(b_small)) and _squares(_trace(a_small))):
        return None
    wide, long = np.einsum("ij,ij->j", cut.b, cut.b), np.einsum("ij,ij->i", cut.a, cut.a)
    other = _added(np.diag(wide) - b_mixed - b_mixed.T + b_small, a_small)
    return _far(_added(np.diag(b_small), long), other, _added(b_small - b_mixed.T, a_mixed))


@lru_cache(maxsize=32)
def _direction(size: int) -> Array:
    """Return (size,) of standard normal numbers, always the same."""
    return np.random.default_rng(size).standard_normal(size)


@dataclass(frozen=True, slots=True)
class Measured:
    """Two updates: ‖ΔW₁‖, ‖ΔW₂‖, ⟨ΔW₁, ΔW₂⟩ and ‖ΔW₁ - ΔW₂‖."""

    norms: tuple[float, float]
    inner: float
    distance: float


def measured(first: LowRank, second: LowRank) -> Measured:
    """Return all that two updates say of each other.

    The distance is that of their inner products where those do not cancel. Else ΔW₁ - ΔW₂ is
    written by what is small already: (B₁ - B₂S) A₁ - B₂ (A₂ - S A₁), with S by least squares, or
    the identity where the factors themselves are close, which needs half of the products.
    """
    near = _near(first, second)
    one, other, cross = near.sums() if near else _sums(first, second)
    norms = _root(*one, first), _root(*other, second)
    apart = near.distance() if near else _far(one, other, cross)
    if apart is None and near is None and math.isfinite(one[1] + other[1]):
        first, second = _solved(first, second)
        apart = _far(*_sums(first, second))
    if apart is None:
        parts = [LowRank(near.b, first.a), LowRank(-second.b, near.a)] if near else [first, second]
        apart = _orthogonal_norm(stacked(parts, [1.0, -1.0]))
    return Measured(norms, cross[0], apart)


@dataclass(frozen=True, slots=True)
class _Near:
    """Two updates whose A is almost the same, by ΔW₁ - ΔW₂ = b A₁ + B₂ a.

    Attributes:
        b: B₁ - B₂.
        a: A₁ - A₂.
        left: B₂ᵀB₂, bᵀB₂ and bᵀb.
        right: A₁A₁ᵀ, A₁aᵀ and aaᵀ.
    """

    b: Array
    a: Array
    left: tuple[Array, Array, Array]
    right: tuple[Array, Array, Array]

    def sums(self) -> tuple[_Sum, _Sum, _Sum]:
        """Return ‖ΔW₁‖², ‖ΔW₂‖² and ⟨ΔW₁, ΔW₂⟩."""
        (b, b_mixed, b_small), (a, a_mixed, a_small) = self.left, self.right
        first = b + b_mixed + _t(b_mixed) + b_small
        second = a - a_mixed - _t(a_mixed) + a_small
        return _added(first, a), _added(b, second), _added(b + b_mixed, a - a_mixed)

    def distance(self) -> float | None:
        """Return ‖ΔW₁ - ΔW₂‖; None where its two terms cancel."""
        (b, b_mixed, b_small), (a, a_mixed, a_small) = self.left, self.right
        return _far(_added(b_small, a), _added(b, a_small), _added(-b_mixed, a_mixed))


def _near(first: LowRank, second: LowRank) -> _Near | None:
    """Return two updates as near ones; None where they are not, or their squares are no numbers."""
    if first.rank != second.rank:
        return None
    with np.errstate(all="ignore"):
        a = first.a - second.a
        moved = np.vdot(a, a)
        if not moved <= _NEAR * np.vdot(first.a, first.a):
            return None
        b = first.b - second.b
        left = _t(second.b) @ second.b, _t(b) @ second.b, _t(b) @ b
        whole = first.a @ _t(first.a)
        none = np.zeros_like(whole)
        right = (whole, first.a @ _t(a), a @ _t(a)) if moved else (whole, none, none)
        sound = all(_squares(_trace(each[0])) for each in (left, right)) and all(
            _squares(_trace(each)) or not by.any() for each, by in ((left[2], b), (right[2], a))
        )
    return _Near(b, a, left, right) if sound else None


def _solved(first: LowRank, second: LowRank) -> tuple[LowRank, LowRank]:
    """Return two small updates of the same difference, with S by least squares."""
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
    sound = _squares(_trace(left)) and _squares(_trace(right))
    return _added(left, right) if sound else (math.nan, math.nan)


def _trace(gram: Array) -> float:
    with np.errstate(all="ignore"):
        return float(np.trace(gram, axis1=-2, axis2=-1).sum())


def _squares(size: float) -> bool:
    """Tell whether a sum of squares has lost nothing to the range of float64."""
    return SMALL < size < 1 / SMALL


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
