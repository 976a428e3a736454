"""What a spectrum says of an update: how large it is, how many directions it uses, how evenly.

σ are the singular values of ΔW, e = σ². Everything but the norms is computed from σ / σ₁ and is the
same for an adapter scaled by 1e-20. For ΔW = 0 there is nothing to measure: null, not 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.dtype import DType
from adapterkit.lowrank.spectrum import energy_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adapterkit.lowrank.products import Array

ENERGY_LEVELS = (0.90, 0.95, 0.99)

# A cumulated share that misses its level by rounding has reached it.
_TOP_ROWS = 8
# Distance of 1 to the next number; of a block-quantised type, half a step of its largest value.
_EPSILON = {
    DType.F64: 2.0**-52,
    DType.F32: 2.0**-23,
    DType.F16: 2.0**-10,
    DType.BF16: 2.0**-7,
    DType.F8_E4M3: 2.0**-3,
    DType.F8_E5M2: 2.0**-2,
    DType.Q8_0: 2.0**-8,
}
_COARSE = 2.0**-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a spectrum; no field depends on the size of the update.

    Attributes:
        stable_rank: Σe / σ₁², between 1 and r.
        utilization: stable rank / r.
        effective_rank: exp H(σ / Σσ), Roy and Vetterli 2007.
        effective_rank_energy: exp H(e / Σe).
        participation_ratio: (Σe)² / Σe².
        energy_rank_90: fewest directions that hold 90 % of Σe.
        energy_rank_95: likewise 95 %.
        energy_rank_99: likewise 99 %.
        energy_error_90: relative Frobenius error of ΔW truncated to energy_rank_90; up to 0.32.
        energy_error_95: likewise for energy_rank_95; up to 0.22.
        energy_error_99: likewise for energy_rank_99; up to 0.10.
        numerical_rank: number of σ over max(out, in) · 2⁻⁵² · σ₁.
        numerical_rank_stored: number of σ over ε · σ₁ with ε of the coarser factor's stored type.
        condition: σ₁ / σ_r; None if the numerical rank is below r.
        entropy: H(σ / Σσ) / ln r, 1 for a flat spectrum; None for r = 1.
        top1_energy: σ₁² / Σe.
    """

    stable_rank: float
    utilization: float
    effective_rank: float
    effective_rank_energy: float
    participation_ratio: float
    energy_rank_90: int
    energy_rank_95: int
    energy_rank_99: int
    energy_error_90: float
    energy_error_95: float
    energy_error_99: float
    numerical_rank: int
    numerical_rank_stored: int
    condition: float | None
    entropy: float | None
    top1_energy: float


def shape_of(relative: Array, *, rank: int, size: tuple[int, int], epsilon: float) -> Shape | None:
    """Return the shape of a spectrum, or None for ΔW = 0.

    Args:
        relative: σ / σ₁, descending; all zero for ΔW = 0.
        rank: inner dimension of the factors, r.
        size: (out, in).
        epsilon: relative rounding of the stored factors.
    """
    if not relative[0]:
        return None
    energy = relative**2
    total = float(energy.sum())
    floor = max(size) * _EPSILON[DType.F64]
    numerical = int(np.count_nonzero(relative > floor))
    amplitude_entropy = _entropy(relative / relative.sum())
    ranks = energy_ranks(relative, ENERGY_LEVELS)
    errors: list[float] = truncation_errors(relative)[ranks].tolist()
    return Shape(
        stable_rank=total,
        utilization=total / rank,
        effective_rank=math.exp(amplitude_entropy),
        effective_rank_energy=math.exp(_entropy(energy / total)),
        participation_ratio=total**2 / float((energy**2).sum()),
        energy_rank_90=ranks[0],
        energy_rank_95=ranks[1],
        energy_rank_99=ranks[2],
        energy_error_90=errors[0],
        energy_error_95=errors[1],
        energy_error_99=errors[2],
        numerical_rank=numerical,
        numerical_rank_stored=int(np.count_nonzero(relative > max(epsilon, floor))),
        condition=1 / float(relative[-1]) if numerical == rank else None,
        entropy=amplitude_entropy / math.log(rank) if rank > 1 else None,
        top1_energy=1 / total,
    )


def truncation_errors(values: Array) -> Array:
    """Return ‖ΔW - ΔW_k‖ / ‖ΔW‖, Frobenius: √(Σ_{i>k} σ² / Σσ²), Eckart and Young 1936.

    Args:
        values: (n,) σ, or σ over any common factor, descending, not all zero.

    Returns:
        (n + 1,) for k = 0 to n.
    """
    # Summed from the smallest: a tail keeps its digits beside a large head.
    rising: Array = np.cumsum(np.append(values, 0.0)[::-1] ** 2, dtype=np.float64)
    return np.sqrt(rising[::-1] / rising[-1])


def _entropy(shares: Array) -> float:
    """Return -Σ p ln p in nats, with 0 ln 0 = 0."""
    positive = shares[shares > 0]
    return max(-float(positive @ np.log(positive)), 0.0)


def storage_epsilon(*dtypes: DType) -> float:
    """Return the relative rounding of the coarsest stored type."""
    return max(_EPSILON.get(dtype, _COARSE) for dtype in dtypes)


def quantile(values: Iterable[float], part: float) -> float:
    """Return the quantile of at least one value, interpolated linearly.

    As numpy's, which imports its masked arrays first; that takes longer than all of these here.
    """
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place % 1)


def hoyer(energy: Array) -> float | None:
    """Return how concentrated norms are: 0 if all are equal, 1 if one is all, Hoyer 2004.

    (√n - ‖x‖₁ / ‖x‖₂) / (√n - 1) of the norms x. None for a single norm or all zero.

    Args:
        energy: (n,) squared norms.
    """
    count, total = energy.size, float(energy.sum())
    if count <= 1 or not total:
        return None
    spread = float(np.sqrt(energy).sum()) / math.sqrt(total)
    return max((math.sqrt(count) - spread) / (math.sqrt(count) - 1), 0.0)


def top_share(energy: Array) -> float | None:
    """Return the share of the eight largest in the sum; None if all are zero.

    Args:
        energy: (n,) squared norms.
    """
    total = float(energy.sum())
    if not total:
        return None
    if energy.size <= _TOP_ROWS:
        return 1.0
    return float(np.partition(energy, -_TOP_ROWS)[-_TOP_ROWS:].sum()) / total
