"""Which ranks an audited adapter needs."""

from __future__ import annotations

import numpy as np

from adapterkit.auditing.report import AdapterAudit, ModuleAudit
from adapterkit.lowrank import planning
from adapterkit.lowrank.greedy import Candidate
from adapterkit.lowrank.rank_plan import Alternative, RankPlan, Suggestion


def suggest(
    audited: AdapterAudit,
    *,
    rank: int | None = None,
    tol: float | None = None,
    budget: int | None = None,
    policy: str | None = None,
    threshold: float | None = None,
) -> RankPlan:
    """Plan a rank for every module; without a wish, for a relative error of 0.1 in total.

    Args:
        audited: what `audit` found, for one adapter.
        rank: the largest rank of any module.
        tol: largest relative Frobenius error of all updates together.
        budget: largest number of parameters of all factors together.
        policy: `sv_ratio`, `sv_cumulative` or `sv_fro`, as kohya's resize_lora names them.
        threshold: the number that `policy` needs.

    Raises:
        UsageError: if the wishes contradict each other, or the budget is below rank 1 everywhere.
    """
    wish = planning.RankWish(rank=rank, tol=tol, budget=budget, policy=policy, threshold=threshold)
    return planning.planned(candidates(audited), wish)


def suggestion(
    audited: AdapterAudit, *, budget: int | None = None, tol: float | None = None
) -> Suggestion:
    """Plan ranks, and show what other plans would cost and lose.

    Raises:
        UsageError: as `suggest`.
    """
    return planning.compared(candidates(audited), budget=budget, tol=tol)


def trade_off(audited: AdapterAudit, points: int = 60) -> list[Alternative]:
    """Return the best error at every size, from rank 1 everywhere to the adapter as it is."""
    return planning.trade_off(candidates(audited), points)


def candidates(audited: AdapterAudit) -> list[Candidate]:
    """Return the modules to plan for, the experts of one together."""
    groups: dict[str, list[ModuleAudit]] = {}
    for module in audited.modules:
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
