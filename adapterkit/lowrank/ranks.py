"""Which rank an update gets, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.lowrank.decomposition import Decomposition
    from adapterkit.lowrank.products import Array

# What the squares of equal norms differ by.
_ROUNDING = 1e-13


@dataclass(frozen=True, slots=True)
class RankRule:
    """How ranks are chosen.

    Attributes:
        rank: the same rank for every module; None for as small a rank as `tolerance` allows.
        tolerance: largest relative Frobenius error of a module; 0 drops rounding alone.
    """

    rank: int | None
    tolerance: float

    def choose(self, spectra: Sequence[Decomposition], limit: int, zero: float) -> int:
        """Return one rank for the experts (or the one matrix) of a module.

        Args:
            spectra: one for each expert; the error counts over all of them.
            limit: the largest rank that makes sense.
            zero: share of the largest singular value that the stored type would round away.
        """
        if self.rank is not None:
            return min(self.rank, limit)
        top = max(float(spectrum.values.max(initial=0.0)) for spectrum in spectra)
        longest = max(int((spectrum.values > zero * top).sum()) for spectrum in spectra)
        chosen = longest
        if self.tolerance:
            chosen = within(self.tolerance, spectra) or longest
        return max(min(chosen, limit), 1)


def rank_rule(rank: int | str | None, tol: float | None, energy: float | None) -> RankRule:
    """Return the rule that `rank`, `tol` and `energy` describe together.

    Raises:
        UsageError: if they contradict each other or are out of range.
    """
    if tol is not None and energy is not None:
        raise UsageError("tol and energy say the same thing, energy = 1 - tol²; give one of them")
    if isinstance(rank, int):
        if tol is not None or energy is not None:
            raise UsageError(f"rank {rank} leaves nothing for tol or energy to choose; drop one")
        if isinstance(rank, bool) or rank < 1:
            raise UsageError(f"rank is {rank!r}, not a whole number from 1")
        return RankRule(rank, 0.0)
    if rank not in {None, "auto"}:
        raise UsageError(f"rank is {rank!r}, neither a whole number nor auto")
    if energy is not None:
        if not 0 < energy <= 1:
            raise UsageError(f"energy is {energy:g}, not a share above 0 and up to 1")
        return RankRule(None, (1 - energy) ** 0.5)
    if tol is not None and not 0 <= tol < 1:
        raise UsageError(f"tol is {tol:g}, not a relative error from 0 and below 1")
    return RankRule(None, tol or 0.0)


def predicted_error(spectrum: Decomposition, rank: int) -> float:
    """Return ‖ΔW - ΔW_r‖ of the truncation to a rank: √(‖ΔW‖² - Σ σ²), exact (Eckart-Young)."""
    return float(tails([spectrum])[min(rank, spectrum.values.size)]) ** 0.5


def tails(spectra: Sequence[Decomposition]) -> Array:
    """Return what truncations to each rank from 0 leave of Σ‖ΔW‖², with what the spectra lack."""
    energy = np.zeros(max(spectrum.values.size for spectrum in spectra) + 1)
    for spectrum in spectra:
        energy[: spectrum.values.size] += spectrum.values**2
        lacking = spectrum.norm**2 - float(np.sum(spectrum.values**2))
        # A difference of equal norms is rounding.
        energy[-1] += lacking if lacking >= _ROUNDING * spectrum.norm**2 else 0.0
    # Summed from the smallest: a tail keeps its digits beside a large head.
    return energy[::-1].cumsum()[::-1]


def within(tolerance: float, spectra: Sequence[Decomposition]) -> int | None:
    """Return the smallest rank of a relative error up to a tolerance; None if none is known."""
    allowed = tolerance**2 * sum(spectrum.norm**2 for spectrum in spectra)
    enough = np.flatnonzero(tails(spectra) <= allowed)
    return int(enough[0]) if enough.size else None
