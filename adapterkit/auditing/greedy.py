"""How ranks are chosen: greedily by energy per parameter, or by a rule for each module alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.auditing.metrics import energy_ranks
from adapterkit.errors import UsageError
from adapterkit.lowrank.products import Array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.auditing.report import ModuleAudit

_SLACK = 1e-12
_ROUNDING = 2.0**-50
# How many exchanges are made, and from how many modules each is chosen.
_EXCHANGES, _EXCHANGED = 16, 16


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module as the planner sees it.

    Attributes:
        module: Hugging Face path.
        rank: inner dimension now.
        scale: effective multiplier.
        cost: parameters of one more rank.
        spectra: (experts, min(r, out, in)) singular values, scale included.
    """

    module: str
    rank: int
    scale: float
    cost: int
    spectra: Array

    @property
    def energy(self) -> Array:
        """σ² summed over the experts, by direction."""
        return np.square(self.spectra).sum(axis=0)


def candidates(modules: Sequence[ModuleAudit]) -> list[Candidate]:
    """Return the modules to plan for, the experts of one together."""
    groups: dict[str, list[ModuleAudit]] = {}
    for module in modules:
        groups.setdefault(module.module, []).append(module)
    return [
        Candidate(
            name,
            group[0].rank,
            group[0].scale,
            len(group) * sum(group[0].shape),
            np.array([module.singular_values for module in group], dtype=np.float64),
        )
        for name, group in groups.items()
    ]


def greedy_order(wanted: Sequence[Candidate]) -> list[int]:
    """Return which module gets the next rank, from rank 1 everywhere to the full ranks.

    What holds no energy is not in the list: no plan needs it.
    """
    gains = [each.energy[1:] / each.cost for each in wanted]
    owners = np.repeat(np.arange(len(wanted)), [len(gain) for gain in gains])
    flat = np.concatenate([*gains, np.zeros(0)])
    order = np.argsort(-flat, kind="stable")
    return [int(owners[index]) for index in order if flat[index] > 0]


def within_budget(wanted: Sequence[Candidate], budget: int) -> list[int]:
    """Return the rank of each module that a number of parameters buys.

    Raises:
        UsageError: if rank 1 everywhere costs more.
    """
    smallest = sum(each.cost for each in wanted)
    if smallest > budget:
        raise UsageError(
            f"a budget of {budget:,} parameters is below rank 1 everywhere, {smallest:,}; "
            "leave modules out instead"
        )
    ranks, spent = [1] * len(wanted), smallest
    full: set[int] = set()
    for index in greedy_order(wanted):
        # A module that no longer fits keeps its rank; cheaper ones may still grow.
        if index in full or spent + wanted[index].cost > budget:
            full.add(index)
            continue
        ranks[index] += 1
        spent += wanted[index].cost
    return _exchanged(wanted, [each.energy for each in wanted], ranks, budget)


def _exchanged(
    wanted: Sequence[Candidate], energies: Sequence[Array], ranks: Sequence[int], budget: int
) -> list[int]:
    """Buy what a greedy plan could not afford, where what is given back for it holds less."""
    best = list(ranks)
    for _ in range(_EXCHANGES):
        trials = [
            _afforded(wanted, energies, _raised(best, index), budget, kept=index)
            for index in _next_best(wanted, energies, best)
        ]
        closest = min(trials, key=lambda trial: _left(energies, trial), default=best)
        if _left(energies, closest) >= _left(energies, best) * (1 - _SLACK):
            break
        best = closest
    return best


def _afforded(
    wanted: Sequence[Candidate],
    energies: Sequence[Array],
    ranks: list[int],
    budget: int,
    kept: int,
) -> list[int]:
    """Give directions back, those that hold least for their cost, until the budget is kept."""
    spare = budget - _cost(wanted, ranks)
    while spare < 0:
        last = [
            (float(energies[index][ranks[index] - 1]) / min(each.cost, -spare), index)
            for index, each in enumerate(wanted)
            if index != kept and ranks[index] > 1
        ]
        if not last:
            return [1] * len(wanted)
        index = min(last)[1]
        ranks[index] -= 1
        spare += wanted[index].cost
    for index in _next_best(wanted, energies, ranks):
        if wanted[index].cost <= spare:
            ranks[index] += 1
            spare -= wanted[index].cost
    return ranks


def _left(energies: Sequence[Array], ranks: Sequence[int]) -> float:
    """Return the energy that ranks leave out."""
    return math.fsum(float(e[rank:].sum()) for e, rank in zip(energies, ranks, strict=True))


def within_error(
    wanted: Sequence[Candidate], tol: float, order: Sequence[int] | None = None
) -> list[int]:
    """Return the smallest rank of each module with a relative error of all together up to `tol`.

    Args:
        wanted: the modules.
        tol: relative Frobenius error.
        order: their `greedy_order`, if it is known already.
    """
    ranks = [1] * len(wanted)
    energies = [each.energy for each in wanted]
    total = float(sum(energy.sum() for energy in energies))
    steps = list(greedy_order(wanted) if order is None else order)
    taken = [1] * len(wanted)
    gains: list[float] = []
    for index in steps:
        gains.append(float(energies[index][taken[index]]))
        taken[index] += 1
    # What is left out after each number of steps, summed from the smallest for accuracy.
    left = np.cumsum([0.0, *reversed(gains)])[::-1]
    # An error of 0 means what float64 cannot tell from 0.
    allowed = max(tol * (1 + _SLACK), _ROUNDING) ** 2 * total
    count = next((step for step in range(len(steps) + 1) if left[step] <= allowed), len(steps))
    for index in steps[:count]:
        ranks[index] += 1
    return _without_spare(wanted, energies, ranks, allowed)


def _without_spare(
    wanted: Sequence[Candidate], energies: Sequence[Array], ranks: Sequence[int], allowed: float
) -> list[int]:
    """Give back what the last step of a greedy plan bought too much.

    The costliest directions that the error can spare go first; then one direction more is bought
    where that spares others that cost more together.
    """
    best = _given_back(wanted, energies, list(ranks), allowed)
    for _ in range(_EXCHANGES):
        trials = [
            _given_back(wanted, energies, _raised(best, index), allowed, kept=index)
            for index in _next_best(wanted, energies, best)
        ]
        cheapest = min(trials, key=lambda trial: _cost(wanted, trial), default=best)
        if _cost(wanted, cheapest) >= _cost(wanted, best):
            break
        best = cheapest
    return best


def _next_best(
    wanted: Sequence[Candidate], energies: Sequence[Array], ranks: Sequence[int]
) -> list[int]:
    """Return the modules whose next direction brings most for its cost."""
    gains = [
        (float(energies[index][ranks[index]]) / each.cost, index)
        for index, each in enumerate(wanted)
        if ranks[index] < len(energies[index])
    ]
    return [index for _, index in sorted(gains, reverse=True)[:_EXCHANGED]]


def _given_back(
    wanted: Sequence[Candidate],
    energies: Sequence[Array],
    ranks: list[int],
    allowed: float,
    kept: int | None = None,
) -> list[int]:
    left = _left(energies, ranks)
    while True:
        last = [float(each[rank - 1]) for each, rank in zip(energies, ranks, strict=True)]
        spare = [
            (each.cost, -last[index], index)
            for index, each in enumerate(wanted)
            if index != kept and ranks[index] > 1 and left + last[index] <= allowed
        ]
        if not spare:
            return ranks
        _, _, index = max(spare)
        ranks[index] -= 1
        left += last[index]


def _raised(ranks: Sequence[int], index: int) -> list[int]:
    return [rank + (place == index) for place, rank in enumerate(ranks)]


def _cost(wanted: Sequence[Candidate], ranks: Sequence[int]) -> int:
    return sum(each.cost * rank for each, rank in zip(wanted, ranks, strict=True))


def by_policy(each: Candidate, policy: str, threshold: float) -> int:
    """Return the rank that a rule of kohya's gives, at least 1; of experts the largest."""
    ranks = [1]
    for values in each.spectra:
        if not values[0]:
            continue
        if policy == "sv_ratio":
            ranks.append(int(np.count_nonzero(values > values[0] / threshold)))
        elif policy == "sv_cumulative":
            ranks.append(energy_ranks(np.sqrt(values), (threshold,))[0])
        else:
            ranks.append(energy_ranks(values, (threshold**2,))[0])
    return max(ranks)


def joint_energy_rank(each: Candidate) -> int:
    """Return the rank that holds 90 % of the energy, of experts the largest; 1 for ΔW = 0."""
    return max((energy_ranks(values, (0.9,))[0] for values in each.spectra if values[0]), default=1)


def errors(wanted: Sequence[Candidate], ranks: Sequence[int]) -> tuple[float, list[float]]:
    """Return the relative error of all modules together, and of each."""
    totals = [float(each.energy.sum()) for each in wanted]
    left = [float(each.energy[rank:].sum()) for each, rank in zip(wanted, ranks, strict=True)]
    total = math.fsum(totals)
    singles = [
        math.sqrt(part / whole) if whole else 0.0 for part, whole in zip(left, totals, strict=True)
    ]
    return math.sqrt(math.fsum(left) / total) if total else 0.0, singles
