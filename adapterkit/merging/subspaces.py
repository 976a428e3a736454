"""Methods that work on singular vectors and shared bases; every result has rank R or less."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.errors import UnsupportedError
from adapterkit.lowrank.decomposition import NUMERICAL_ZERO, balanced, basis, decompose
from adapterkit.lowrank.products import LowRank, nothing, stacked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.lowrank.products import Array

    Parameters = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Space:
    """Updates in coordinates of bases that they share.

    Attributes:
        updates: the updates as seen from the bases, all of one shape.
        back: takes a merged update of that shape back: left · M · right.
    """

    updates: tuple[LowRank, ...]
    back: Callable[[LowRank], LowRank]


def cat(updates: Sequence[LowRank], weights: Array, parameters: Parameters) -> LowRank:
    """The weighted sum, exactly: B = [w₁B₁ … w_TB_T], A = [A₁; …; A_T]."""
    del parameters
    return stacked(updates, list(weights))


def linear_peft(updates: Sequence[LowRank], weights: Array, parameters: Parameters) -> LowRank:
    """PEFT's `linear`: A = Σ ±√|cᵢ| Aᵢ and B = Σ √|cᵢ| Bᵢ, where c is weight · scale.

    Their product has T(T - 1) cross terms Bᵢ · Aⱼ that belong to no adapter.

    Raises:
        UnsupportedError: if the ranks differ.
    """
    del parameters
    there = [(u, w * u.scale) for u, w in zip(updates, weights, strict=True) if u.rank and u.scale]
    if not there:
        return nothing(updates[0].shape)
    ranks = {update.rank for update, _ in there}
    if len(ranks) > 1:
        raise UnsupportedError(
            f"linear-peft adds A to A, and the ranks are {sorted(ranks)}; use linear or svd"
        )
    a = sum((math.copysign(abs(c) ** 0.5, c) * u.a for u, c in there), np.zeros(()))
    b = sum((abs(c) ** 0.5 / u.scale * u.b for u, c in there), np.zeros(()))
    return LowRank(b, a)


def tsv(updates: Sequence[LowRank], weights: Array, parameters: Parameters) -> LowRank:
    """Singular vectors of all updates, made orthogonal, carry their own singular values.

    Gargiulo et al. (2025), "Task Singular Vectors", TSV-M: U⊥ Σ V⊥ᵀ, where U⊥ is the orthogonal
    matrix nearest to [U₁ … U_T]. `density` is the share of each update's vectors that is kept, and
    no update keeps more than its T-th part of the smaller side. Vectors that depend on others, as
    those of a duplicate, share their direction.
    """
    density = parameters.get("density") or 1.0
    room = max(min(updates[0].shape) // len(updates), 1)
    lefts: list[Array] = []
    rights: list[Array] = []
    values: list[Array] = []
    for update, weight in zip(updates, weights, strict=True):
        spectrum = decompose(update)
        kept = min(max(int(density * spectrum.values.size), 1), room)
        u, vt = spectrum.vectors
        lefts.append(u[:, :kept])
        rights.append(vt[:kept].T)
        values.append(weight * spectrum.values[:kept])
    if not sum(value.size for value in values):
        return nothing(updates[0].shape)
    left = _nearest_orthogonal(np.concatenate(lefts, axis=1))
    right = _nearest_orthogonal(np.concatenate(rights, axis=1))
    return LowRank(left * np.concatenate(values), right.T)


def _nearest_orthogonal(tall: Array) -> Array:
    """Return the polar factor of (d, r), a partial isometry where columns depend on each other."""
    to_basis, upper = basis(tall)
    u, values, vt = np.linalg.svd(upper, full_matrices=False)
    kept = values > NUMERICAL_ZERO * values[0]
    return tall @ (to_basis @ (u[:, kept] @ vt[kept]))


def iso_c_core(updates: Sequence[LowRank], weights: Array, parameters: Parameters) -> LowRank:
    """The weighted sum with every singular value replaced by their mean, in core space.

    Iso-C (Marczak et al. 2025, "No Task Left Behind") as Panariello et al. (2025) run it in core
    space: the mean is that of the R values that are not rounding. On whole matrices it would divide
    by the width of the layer and fill directions that no adapter has. `rank` keeps the largest
    before they are made equal. A direction that appears, however weak, is raised to the mean: the
    result is not continuous there.
    """
    spectrum = decompose(stacked(updates, list(weights)))
    kept = min(int(parameters.get("rank") or spectrum.values.size), spectrum.values.size)
    if not kept:
        return nothing(updates[0].shape)
    level = float(spectrum.values[:kept].mean())
    u, vt = spectrum.vectors
    return LowRank(u[:, :kept] * level, vt[:kept])


def iso_cts_core(updates: Sequence[LowRank], weights: Array, parameters: Parameters) -> LowRank:
    """Iso-C of the sum's leading directions and of each update's own, in core space.

    Marczak et al. (2025), "No Task Left Behind", Iso-CTS, with the R dimensions of core space where
    it has the width of the layer: `common` of them are the sum's, the rest are shared out among
    what the updates have outside of the left ones; all are made orthogonal, and get the mean value.
    """
    spectrum = decompose(stacked(updates, list(weights)))
    size, count = spectrum.values.size, len(updates)
    size = min(int(parameters.get("rank") or size), size)
    common = int(size * _number(parameters, "common", 0.8))
    own = round((size - common) / count)
    common = size - own * count
    u, vt = spectrum.vectors
    u = u[:, :common]
    lefts, rights, values = [u], [vt[:common].T], [spectrum.values[:common]]
    for update, weight in zip(updates, weights, strict=True):
        apart = decompose(LowRank((update.b - u @ (u.T @ update.b)) * weight, update.a))
        left, right = apart.vectors
        lefts.append(left[:, :own])
        rights.append(right[:own].T)
        values.append(apart.values[:own])
    values = np.concatenate(values)
    if not values.size:
        return nothing(updates[0].shape)
    left = _nearest_orthogonal(np.concatenate(lefts, axis=1))
    right = _nearest_orthogonal(np.concatenate(rights, axis=1))
    return LowRank(left * float(values.mean()), right.T)


def cart_core(updates: Sequence[LowRank], weights: Array, parameters: Parameters) -> LowRank:
    """The mean, and the leading directions of what each update is apart from it, in core space.

    Choi et al. (2024), "Revisiting weight averaging for model merging", CART, as Panariello et al.
    (2025) run it in core space: ⌈`density` · R⌉ directions of each ΔWᵢ - mean are kept, and
    `coefficient` times their sum is added to the mean. With all directions they would sum to 0.
    """
    coefficient = _number(parameters, "coefficient", 1.0)
    total = float(weights.sum())
    mean = stacked(updates, list(weights))
    size = min(core_space(updates).updates[0].shape)
    kept = math.ceil(_number(parameters, "density", 1.0) * size)
    centre = stacked([mean], [1 / total if total else 0.0])
    parts, scales = [mean], [1.0]
    for update, weight in zip(updates, weights, strict=True):
        apart = decompose(stacked([update, centre], [1.0, -1.0]))
        u, vt = apart.vectors
        parts.append(LowRank(u[:, :kept] * apart.values[:kept], vt[:kept]))
        scales.append(coefficient * float(weight) * len(updates))
    return stacked(parts, scales)


def knots_space(updates: Sequence[LowRank]) -> Space:
    """[ΔW₁ … ΔW_T] = U Σ [V₁ … V_T]ᵀ; update i becomes Σ Vᵢᵀ = Uᵀ ΔWᵢ, of shape (k, in).

    Stoica et al. (2024), "Model merging with SVD to tie the KnOTS".
    """
    all_b = np.concatenate([update.b for update in updates], axis=1)
    to_basis, upper = basis(all_b)
    blocks = np.split(upper, np.cumsum([update.rank for update in updates])[:-1], axis=1)
    rights = [basis(update.a.T)[1].T for update in updates]
    core = np.concatenate([b @ a for b, a in zip(blocks, rights, strict=True)], axis=1)
    u, values, _ = np.linalg.svd(core, full_matrices=False)
    u = u[:, values > NUMERICAL_ZERO * values.max(initial=0.0)]
    left = all_b @ (to_basis @ u)
    seen = tuple(LowRank(u.T @ b, each.a) for b, each in zip(blocks, updates, strict=True))
    return Space(seen, lambda merged: LowRank(left @ merged.b, merged.a))


def core_space(updates: Sequence[LowRank]) -> Space:
    """Update i becomes its core U_Bᵀ ΔWᵢ V_A, (k, k), in bases of all B and all A.

    Panariello et al. (2025), "Accurate and efficient low-rank model merging in core space". The
    bases are those of the factors as they are stored, and so depend on the factors' own basis.
    """
    left = _principal(np.concatenate([update.b for update in updates], axis=1))
    right = _principal(np.concatenate([update.a for update in updates], axis=0).T)
    seen = tuple(LowRank(left.T @ update.b, update.a @ right) for update in updates)
    return Space(seen, lambda merged: LowRank(left @ merged.b, merged.a @ right.T))


def balanced_core_space(updates: Sequence[LowRank]) -> Space:
    """The core space of balanced factors, which every basis of the same updates leads to."""
    return core_space([balanced(update) for update in updates])


SPACES = {"knots": knots_space, "core": core_space, "core-balanced": balanced_core_space}


def _number(parameters: Parameters, name: str, default: float) -> float:
    value = parameters.get(name)
    return default if value is None else value


def _principal(tall: Array) -> Array:
    """Return the left singular vectors of (d, r), (d, k) in the order of their values."""
    to_basis, upper = basis(tall)
    u, values, _ = np.linalg.svd(upper, full_matrices=False)
    return tall @ (to_basis @ u[:, values > NUMERICAL_ZERO * values.max(initial=0.0)])
