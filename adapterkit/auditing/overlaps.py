"""What updates of one matrix have in common, from r x r products of their factors.

With ΔW = U Σ Vᵀ, U = B·T and V = Aᵀ·S for small T and S, so UᵢᵀUⱼ = Tᵢᵀ(BᵢᵀBⱼ)Tⱼ; the vectors
themselves are never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.lowrank.decomposition import decompose
from adapterkit.lowrank.products import Array, LowRank

if TYPE_CHECKING:
    from collections.abc import Sequence

# Directions that hold less than 1e-12 of the energy are no directions to compare.
_NOTHING = 1e-6


@dataclass(frozen=True, slots=True)
class SpectralUpdate:
    """One matrix of one adapter; U = B·to_u and V = Aᵀ·to_v."""

    a: Array
    b: Array
    values: Array
    to_u: Array
    to_v: Array
    sign: float

    @property
    def energy(self) -> float:
        return float((self.values**2).sum())


@dataclass(frozen=True, slots=True)
class Products:
    """UᵢᵀUⱼ and VᵢᵀVⱼ of every two updates of one matrix, as blocks."""

    left: dict[tuple[int, int], Array]
    right: dict[tuple[int, int], Array]

    def inner(self, updates: dict[int, SpectralUpdate], i: int, j: int) -> float:
        """Return ⟨ΔWᵢ, ΔWⱼ⟩."""
        first, second = updates[i], updates[j]
        weight = np.outer(first.values, second.values) * (first.sign * second.sign)
        return float((weight * self.left[i, j] * self.right[i, j]).sum())


def spectral(each: LowRank, scale: float) -> SpectralUpdate:
    """Return an update by its singular values and the ways from its factors to its vectors."""
    found = decompose(LowRank(each.b * abs(scale), each.a), _NOTHING)
    return SpectralUpdate(
        each.a,
        found.update.b,
        found.values,
        found.left,
        found.right.T,
        math.copysign(1.0, scale),
    )


def products_of(updates: dict[int, SpectralUpdate], pairs: Sequence[tuple[int, int]]) -> Products:
    """Return the products of the wanted pairs."""
    left: dict[tuple[int, int], Array] = {}
    right: dict[tuple[int, int], Array] = {}
    for i, j in pairs:
        first, second = updates[i], updates[j]
        left[i, j] = first.to_u.T @ (first.b.T @ second.b) @ second.to_u
        right[i, j] = first.to_v.T @ (first.a @ second.a.T) @ second.to_v
    return Products(left, right)


def overlap(product: Array) -> tuple[float, tuple[float, ...]]:
    """Return ‖U₁ᵀU₂‖² / min(r₁, r₂) and the principal angles in degrees (Björck and Golub 1973)."""
    cosines = np.clip(np.linalg.svd(product, compute_uv=False), 0.0, 1.0)
    angles = np.degrees(np.arccos(cosines))
    return float((cosines**2).mean()), tuple(angles.tolist())


def task_interference(
    updates: dict[int, SpectralUpdate], products: Products, numbers: Sequence[int]
) -> tuple[float | None, float | None]:
    """Return ‖(UᵀU - I) Σ (VᵀV - I)‖₁ over all singular vectors side by side, and it over Σσ.

    Within one adapter the vectors are orthonormal, so that only blocks of two adapters are not 0.
    A negative scale is a turned V; that of the outer adapter does not change a magnitude.
    """
    total = 0.0
    for i in numbers:
        for j in numbers:
            block: Array | float = 0.0
            for k in numbers:
                if k not in {i, j}:
                    left, right = _block(products.left, i, k), _block(products.right, k, j)
                    block = block + (left * updates[k].values) @ right * updates[k].sign
            total += float(np.abs(block).sum())
    amplitude = sum(float(updates[number].values.sum()) for number in numbers)
    return (total, total / amplitude) if amplitude else (None, None)


def _block(products: dict[tuple[int, int], Array], i: int, j: int) -> Array:
    return products[i, j] if (i, j) in products else products[j, i].T
