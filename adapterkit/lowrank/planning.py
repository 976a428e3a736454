"""Which rank each module needs: the most energy for the fewest parameters.

One more direction of a module costs out + in parameters and keeps σ²_{k+1} of the energy. Both are
known from the spectra, and σ² falls within a module, so taking the best direction per parameter
first gives the smallest total Frobenius error at every size (up to the last step).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterkit.errors import UsageError, unknown
from adapterkit.lowrank.greedy import (
    Candidate,
    by_policy,
    errors,
    greedy_order,
    joint_energy_rank,
    within_budget,
    within_error,
)
from adapterkit.lowrank.rank_plan import Alternative, ModuleRank, RankPlan, Suggestion

DEFAULT_TOL = 0.1
# Error bounds of the table of alternatives; the last is what keeps 90 % of the energy.
BOUNDS = (0.02, 0.05, 0.1, 0.2, 0.1**0.5)
POLICIES = ("sv_ratio", "sv_cumulative", "sv_fro")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWish:
    """What a plan of ranks is to meet; without a wish, a relative error of 0.1 in total.

    Attributes:
        rank: the largest rank of any module; alone, or as a cap on `policy`.
        tol: largest relative Frobenius error of all updates together.
        budget: largest number of parameters of all factors together.
        policy: a rule for each module alone, as kohya's resize_lora names them: `sv_ratio` keeps
            σ > σ₁ / threshold, `sv_cumulative` keeps that share of Σσ, `sv_fro` of √Σσ².
        threshold: the number that `policy` needs.

    Raises:
        UsageError: if the wishes contradict each other, or no plan can meet one.
    """

    rank: int | None = None
    tol: float | None = None
    budget: int | None = None
    policy: str | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be met."""
        rank, tol, policy, threshold = self.rank, self.tol, self.policy, self.threshold
        given = [
            name for name, value in (("tol", tol), ("budget", self.budget)) if value is not None
        ]
        given += ["rank"] if rank is not None and policy is None else []
        given += ["policy"] if policy is not None else []
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} contradict each other; give one of them")
        if rank is not None and rank < 1:
            raise UsageError(f"rank {rank} is below 1, the smallest that a factor can have")
        if tol is not None and not 0 <= tol < 1:
            raise UsageError(f"tol {tol:g} is no relative error from 0 to below 1")
        if policy is not None and policy not in POLICIES:
            raise unknown("policy", policy, POLICIES)
        if (policy is None) != (threshold is None):
            raise UsageError("a policy and its threshold are given together")
        if policy == "sv_ratio" and threshold is not None and not threshold >= 1:
            raise UsageError(f"sv_ratio {threshold:g} is below 1, which would keep nothing")
        if policy in POLICIES[1:] and threshold is not None and not 0 < threshold <= 1:
            raise UsageError(f"{policy} {threshold:g} is no share from 0 to 1")


def planned(wanted: Sequence[Candidate], wish: RankWish) -> RankPlan:
    """Plan a rank for every module.

    Raises:
        UsageError: if the budget is below rank 1 everywhere.
    """
    rank, policy, threshold = wish.rank, wish.policy, wish.threshold
    if policy is not None and threshold is not None:
        chosen = [min(by_policy(each, policy, threshold), rank or each.rank) for each in wanted]
        words = f"{policy} {threshold:g}" + (f", rank up to {rank}" if rank else "")
    elif rank is not None:
        chosen = [min(each.rank, rank) for each in wanted]
        words = f"rank up to {rank}"
    elif wish.budget is not None:
        chosen = within_budget(wanted, wish.budget)
        words = f"at most {wish.budget:,} parameters"
    else:
        bound = DEFAULT_TOL if wish.tol is None else wish.tol
        chosen = within_error(wanted, bound)
        words = f"relative error at most {bound:g}"
    return _plan(wanted, chosen, words)


def compared(
    wanted: Sequence[Candidate], *, budget: int | None = None, tol: float | None = None
) -> Suggestion:
    """Plan ranks, and show what other plans would cost and lose.

    Raises:
        UsageError: as `RankWish` and `planned`.
    """
    order = greedy_order(wanted)
    largest = max(each.rank for each in wanted)
    by_energy = [joint_energy_rank(each) for each in wanted]
    return Suggestion(
        plan=planned(wanted, RankWish(budget=budget, tol=tol)),
        bounds=tuple(
            _alternative(bound, wanted, within_error(wanted, bound, order)) for bound in BOUNDS
        ),
        energy_90=_alternative(0.9, wanted, by_energy),
        uniform=tuple(
            _alternative(rank, wanted, [min(each.rank, rank) for each in wanted])
            for rank in _steps(largest)
        ),
    )


def trade_off(wanted: Sequence[Candidate], points: int = 60) -> list[Alternative]:
    """Return the best error at every size, from rank 1 everywhere to the adapter as it is."""
    order = greedy_order(wanted)
    marks = {round(step) for step in np.linspace(0, len(order), points)}
    ranks, found = [1] * len(wanted), list[Alternative]()
    for step in range(len(order) + 1):
        if step in marks:
            found.append(_alternative(0.0, wanted, ranks))
        if step < len(order):
            ranks[order[step]] += 1
    return found


def _steps(largest: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12 ... up to the largest rank."""
    steps = {largest}
    for power in range(largest.bit_length()):
        steps |= {2**power, 3 * 2**power}
    return sorted(step for step in steps if step <= largest)


def _alternative(limit: float, wanted: Sequence[Candidate], ranks: Sequence[int]) -> Alternative:
    cost = sum(each.cost * rank for each, rank in zip(wanted, ranks, strict=True))
    return Alternative(limit, cost, errors(wanted, ranks)[0])


def _plan(wanted: Sequence[Candidate], ranks: Sequence[int], policy: str) -> RankPlan:
    error, singles = errors(wanted, ranks)
    modules = tuple(
        ModuleRank(
            module=each.module,
            rank_before=each.rank,
            rank=rank,
            scale=each.scale,
            parameters=each.cost * rank,
            relative_error=single,
            next_singular_value=float(each.spectra[:, rank:].max(initial=0.0)),
        )
        for each, rank, single in zip(wanted, ranks, singles, strict=True)
    )
    return RankPlan(
        policy=policy,
        parameters_before=sum(each.cost * each.rank for each in wanted),
        parameters=sum(module.parameters for module in modules),
        relative_error=error,
        max_module_error=max(singles),
        modules=modules,
        peft=_peft_settings(modules),
    )


def _peft_settings(modules: Sequence[ModuleRank]) -> dict[str, Any]:
    r"""Return LoraConfig fields; alpha = scale · rank, because PEFT divides by the rank again.

    PEFT matches a pattern with `re.match(rf"(.*\.)?({key})$", name)` and takes the first hit, so
    names are escaped and anchored: each pattern can hit its own module only.
    """
    alphas = {module.module: _whole(module.scale * module.rank) for module in modules}
    rank = _most_common(module.rank for module in modules)
    alpha = _most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {
            "^" + re.escape(module.module): module.rank for module in modules if module.rank != rank
        },
        "alpha_pattern": {
            "^" + re.escape(name): value for name, value in alphas.items() if value != alpha
        },
    }


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value
