"""Norms, distances and inner products of updates, from r x r products of their factors.

With G_B = BᵀB and G_A = AAᵀ, ‖BA‖² = Σ G_B ∘ G_A, and ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ). A sum of
squares whose terms cancel is taken from orthogonal decompositions instead: every norm and distance
is right to 1e-12 of itself, or to 1e-15 of ‖B‖ ‖A‖ where B · A is what such products leave.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.lowrank.decomposition import orthogonal_triangle
from adapterkit.lowrank.products import SMALL, LowRank, stacked, unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.lowrank.products import Array

# A sum of at least this share of its terms' magnitudes has lost three digits of sixteen.
_CLEAR = 1e-3


def inner(first: LowRank, second: LowRank) -> float:
    """Return ⟨ΔW₁, ΔW₂⟩; NaN if a factor is not finite."""
    with np.errstate(all="ignore"):
        products = (_t(first.b) @ second.b) * (first.a @ _t(second.a))
        return float(products.sum())


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
    with np.errstate(all="ignore"):
        left, right = _t(update.b) @ update.b, update.a @ _t(update.a)
        products = left * right
        squared, bound = float(products.sum()), float(np.abs(products).sum())
        sizes = [float(np.trace(each, axis1=-2, axis2=-1).sum()) for each in (left, right)]
    if all(SMALL < size < 1 / SMALL for size in sizes) and squared >= _CLEAR * bound:
        return squared**0.5
    return _orthogonal_norm(update)


def _orthogonal_norm(update: LowRank) -> float:
    b, b_size = unit(update.b)
    a, a_size = unit(update.a)
    if not b_size or not a_size:
        return b_size * a_size
    if not math.isfinite(b_size + a_size):
        return math.nan
    core = orthogonal_triangle(b) @ _t(orthogonal_triangle(_t(a)))
    return float(np.linalg.norm(core)) * b_size * a_size


def distance(first: LowRank, second: LowRank) -> float:
    """Return ‖ΔW₁ - ΔW₂‖, Frobenius; NaN if a factor is not finite.

    It is the norm of one product: of (B₂ - B₁) A₁ + B₂ (A₂ - A₁) where the ranks are equal, so that
    factors which are close lose nothing, else of B₁ A₁ - B₂ A₂.
    """
    if first.rank != second.rank:
        return norm(stacked([first, second], [1.0, -1.0]))
    with np.errstate(all="ignore"):
        b = np.concatenate([second.b - first.b, second.b], axis=-1)
        a = np.concatenate([first.a, second.a - first.a], axis=-2)
    return norm(LowRank(b, a))


def _t(matrices: Array) -> Array:
    return matrices.swapaxes(-1, -2)
