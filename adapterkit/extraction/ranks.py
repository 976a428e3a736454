"""Where the signal of a difference ends: the rank to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.errors import UsageError
from adapterkit.lowrank.decomposition import Decomposition
from adapterkit.lowrank.ranks import RankRule, rank_rule, tails, within
from adapterkit.lowrank.sketching import compressed

if TYPE_CHECKING:
    from adapterkit.extraction.difference import Difference
    from adapterkit.lowrank.products import Array, Key

# How far a singular value must stand above the edge that is expected of noise. Rounding's is a
# bound; that of the rest is a mean, around which small matrices scatter (Tracy and Widom 1994).
_ABOVE_ROUNDING, _ABOVE_REST = 1.05, 1.2
# An update of one or two ranks is rounded alike all along a row: its rounding has some structure,
# and values up to this many times the edge.
_FEW, _STRUCTURED = 2, 3.0
_FIRST, _GROWTH = 24, 4
# Share of ‖ΔW‖² that is rounding of the sum.
_NOTHING = 1e-13
# Engines serve up to a few hundred ranks; what needs more is no adapter.
MOST = 256


@dataclass(frozen=True, slots=True)
class Wish:
    """How many ranks are wanted.

    Attributes:
        rule: a number, or a tolerance; tolerance 0 without a number asks for the signal.
        most: ranks that are never exceeded.
    """

    rule: RankRule
    most: int | None


def wish(
    rank: int | str | None, tol: float | None, energy: float | None, max_rank: int | None
) -> Wish:
    """Return what `rank`, `tol`, `energy` and `max_rank` ask for together.

    Raises:
        UsageError: if they contradict each other or are out of range.
    """
    rule = rank_rule(rank, tol, energy)
    if max_rank is not None:
        if rule.rank is not None:
            raise UsageError(f"rank {rule.rank} is what every module gets; leave out max_rank")
        if max_rank < 1:
            raise UsageError(f"max_rank is {max_rank!r}, not a whole number from 1")
        return Wish(rule, max_rank)
    return Wish(rule, MOST if rule.rank is None and not rule.tolerance else None)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The leading singular values of a difference, and how many of them to write.

    Attributes:
        spectrum: at least the values that are written.
        rank: how many; 0 where all of it is noise.
        capped: whether more would have been asked for.
    """

    spectrum: Decomposition
    rank: int
    capped: bool


def choose(found: Difference, asked: Wish, key: Key) -> Chosen:
    """Return as many singular values as a wish asks for, by as small a sketch as tells."""
    smaller = min(found.plane.shape)
    most = smaller if asked.most is None else min(asked.most, smaller)
    floor = 0.0 if asked.rule.tolerance else _ABOVE_ROUNDING * found.edge
    start: Array = np.zeros((0, found.plane.shape[1]))
    wanted = min(_FIRST, most) if asked.rule.rank is None else min(asked.rule.rank, smaller)
    while True:
        spectrum = compressed(found.plane, wanted, start, key, floor=floor)
        rank, enough = _rank(spectrum, found, asked)
        if enough or wanted >= most or asked.rule.rank is not None:
            return Chosen(spectrum, min(rank, most), capped=not enough or rank > most)
        start, wanted = spectrum.vectors[1], min(wanted * _GROWTH, most)


def _rank(spectrum: Decomposition, found: Difference, asked: Wish) -> tuple[int, bool]:
    """Return the rank that the known values call for, and whether more of them would change it."""
    values = spectrum.values
    everything = values.size >= min(found.plane.shape) or tails([spectrum])[-1] == 0
    rule = asked.rule
    if rule.rank is not None:
        return min(rule.rank, _above_rounding(values, found.edge)), True
    if rule.tolerance:
        enough = within(rule.tolerance, [spectrum])
        return (values.size, everything) if enough is None else (enough, True)
    rank = _signal(spectrum, found)
    return rank, everything or rank < values.size


def _above_rounding(values: Array, edge: float) -> int:
    """Return how many singular values rounding does not explain."""
    clear = int(np.count_nonzero(values > _STRUCTURED * edge))
    if edge and 0 < clear <= _FEW:
        return clear
    return int(np.count_nonzero(values > _ABOVE_ROUNDING * edge))


def _signal(spectrum: Decomposition, found: Difference) -> int:
    """Return how many singular values stand above what noise explains.

    Noise is the rounding of the stored type, whose size is known, and whatever else the rest looks
    like: if what is left after k values were noise of one size, its largest singular value would be
    about rms · (√(rows - k) + √(columns - k)), by what is left of ‖ΔW‖².
    """
    values = spectrum.values
    ranks = np.arange(1, values.size + 1)
    rows, columns = (np.maximum(size - ranks, 0.5) for size in found.plane.shape)
    left = tails([spectrum])[1:]
    left[left < _NOTHING * spectrum.norm**2] = 0.0
    edges = np.sqrt(left / (rows * columns)) * (np.sqrt(rows) + np.sqrt(columns))
    above = (values > _ABOVE_REST * edges) & (ranks <= _above_rounding(values, found.edge))
    if not found.edge:
        # Of the last values too little is left to tell; without a known rounding half must do.
        above &= ranks <= min(found.plane.shape) // 2
    return int(ranks[above].max(initial=0))
