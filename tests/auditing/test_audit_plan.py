"""Rank advice: the best error at every size, and stated truthfully."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from audit_adapters import adapter, layered, planted

from adapterkit import AdapterAudit, RankPlan, UsageError, audit, suggest
from adapterkit.auditing.plan import trade_off
from adapterkit.lowrank.greedy import Candidate, within_budget, within_error
from adapterkit.model import Kind

SPECTRA = {
    "layers.0.wide": ([9.0, 3.1, 1.0, 0.1], 60, 20),
    "layers.0.thin": ([4.0, 2.0, 1.5, 1.2], 10, 10),
    "layers.1.thin": ([1.0, 0.01, 0.001], 10, 10),
}


def small(scale: float = 1.0) -> AdapterAudit:
    pairs = {
        name: planted(values, out, inputs, seed=len(name) + out)
        for name, (values, out, inputs) in SPECTRA.items()
    }
    return audit(adapter(pairs, scale=scale)).adapters[0]


def error_of(ranks: dict[str, int]) -> float:
    left = sum(sum(v**2 for v in SPECTRA[name][0][k:]) for name, k in ranks.items())
    return (left / sum(v**2 for values, _, _ in SPECTRA.values() for v in values)) ** 0.5


def cost_of(ranks: dict[str, int]) -> int:
    return sum((SPECTRA[name][1] + SPECTRA[name][2]) * k for name, k in ranks.items())


def all_plans() -> list[dict[str, int]]:
    spans = [range(1, len(values) + 1) for values, _, _ in SPECTRA.values()]
    return [dict(zip(SPECTRA, ranks, strict=True)) for ranks in itertools.product(*spans)]


@pytest.mark.parametrize("budget", [120, 140, 180, 200, 240, 300, 460])
def test_no_plan_within_a_budget_is_much_better(budget: int) -> None:
    plan = suggest(small(), budget=budget)
    assert plan.parameters == cost_of(plan.ranks) <= budget
    assert plan.relative_error == pytest.approx(error_of(plan.ranks), abs=1e-12)
    # Greedy is the best up to its last step: with one wide step more nothing beats it.
    better = [p for p in all_plans() if cost_of(p) <= budget - 80]
    assert all(plan.relative_error <= error_of(p) + 1e-12 for p in better)


@pytest.mark.parametrize("tol", [0.0, 0.01, 0.1, 0.3, 0.35])
def test_a_bound_is_kept_and_not_with_one_direction_less(tol: float) -> None:
    plan = suggest(small(), tol=tol)
    assert plan.relative_error <= tol + 1e-12
    kept = {
        name: values[plan.ranks[name] - 1] ** 2 / (out + inputs)
        for name, (values, out, inputs) in SPECTRA.items()
        if plan.ranks[name] > 1
    }
    assert kept
    last = min(kept, key=lambda name: kept[name])
    assert error_of(plan.ranks | {last: plan.ranks[last] - 1}) > tol


def test_a_bound_of_zero_keeps_what_is_more_than_rounding() -> None:
    a, b = planted([1.0] * 3, 30, 20)
    twice = np.concatenate([a, a]), np.concatenate([b, b], axis=1)
    plan = suggest(audit(adapter({"x": twice})).adapters[0], tol=0)
    assert plan.ranks == {"x": 3}
    assert plan.relative_error < 1e-14


def test_the_default_is_an_error_of_a_tenth() -> None:
    plan = suggest(small())
    assert plan.policy == "relative error at most 0.1"
    assert plan == suggest(small(), tol=0.1)


def test_every_module_states_its_own_error_and_what_is_next() -> None:
    plan = suggest(small(scale=-2.0), rank=2)
    assert list(plan.ranks.values()) == [2, 2, 2]
    wide, thin, tiny = plan.modules
    assert wide.relative_error == pytest.approx((1.01 / (81 + 9.61 + 1.01)) ** 0.5)
    assert wide.next_singular_value == pytest.approx(2.0)
    assert thin.next_singular_value == pytest.approx(3.0)
    assert tiny.parameters == 40
    assert plan.max_module_error == thin.relative_error
    assert {module.scale for module in plan.modules} == {-2.0}


@pytest.mark.parametrize(
    ("policy", "threshold", "ranks"),
    [
        ("sv_ratio", 5.0, [2, 4, 1]),
        ("sv_ratio", 1.0, [1, 1, 1]),
        ("sv_cumulative", 0.9, [2, 4, 1]),
        ("sv_cumulative", 0.99, [3, 4, 2]),
        ("sv_fro", 0.9, [1, 2, 1]),
        ("sv_fro", 1.0, [4, 4, 3]),
    ],
)
def test_kohyas_policies(policy: str, threshold: float, ranks: list[int]) -> None:
    plan = suggest(small(), policy=policy, threshold=threshold)
    assert list(plan.ranks.values()) == ranks
    capped = suggest(small(), policy=policy, threshold=threshold, rank=2)
    assert list(capped.ranks.values()) == [min(rank, 2) for rank in ranks]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"tol": 0.1, "budget": 200}, "tol and budget contradict"),
        ({"tol": 0.1, "rank": 2}, "tol and rank contradict"),
        ({"budget": 90}, "below rank 1 everywhere, 120"),
        ({"rank": 0}, "rank 0 is below 1"),
        ({"tol": 1.0}, "tol 1 is no relative error"),
        ({"tol": float("nan")}, "tol nan is no relative error"),
        ({"policy": "knee", "threshold": 1.0}, "known: sv_ratio, sv_cumulative, sv_fro"),
        ({"policy": "sv_fro"}, "given together"),
        ({"threshold": 0.9}, "given together"),
        ({"policy": "sv_fro", "threshold": 1.5}, "no share"),
        ({"policy": "sv_ratio", "threshold": 0.5}, "below 1"),
    ],
)
def test_contradicting_wishes_are_refused(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        suggest(small(), **wishes)


def test_the_ranks_of_experts_are_chosen_together() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((4, 3, 12)), random.standard_normal((4, 20, 3))
    b[2:, :, 2] = 0
    name = "layers.0.experts.down_proj"
    audited = audit(adapter({name: (a, b)}, kinds={name: Kind.EXPERTS})).adapters[0]
    plan = suggest(audited, rank=2)
    assert plan.ranks == {"layers.0.experts.down_proj": 2}
    assert plan.parameters == 4 * 2 * 32
    left = sum(m.singular_values[2] ** 2 for m in audited.modules)
    whole = sum(m.frobenius_norm**2 for m in audited.modules)
    assert plan.relative_error == pytest.approx((left / whole) ** 0.5)
    full = suggest(audited, policy="sv_fro", threshold=1.0)
    assert full.ranks == {"layers.0.experts.down_proj": 3}


def test_alternatives_are_what_the_plans_would_be() -> None:
    report = audit(adapter(layered(3, rank=8)), suggest=True)
    audited, found = report.adapters[0], report.suggestions[0]
    for row in found.bounds:
        plan = suggest(audited, tol=row.limit)
        assert (row.parameters, row.relative_error) == (plan.parameters, plan.relative_error)
    assert [row.limit for row in found.uniform] == [1, 2, 3, 4, 6, 8]
    for row in found.uniform:
        plan = suggest(audited, rank=int(row.limit))
        assert (row.parameters, row.relative_error) == (plan.parameters, plan.relative_error)
    # 90 % of the energy of every module is at most 32 % error, and not the best use of its size.
    assert 0.1 < found.energy_90.relative_error <= 0.1**0.5
    best = suggest(audited, budget=found.energy_90.parameters)
    assert best.relative_error <= found.energy_90.relative_error


def test_the_trade_off_falls_from_rank_one_to_nothing_lost() -> None:
    audited = audit(adapter(layered(3, rank=8))).adapters[0]
    curve = trade_off(audited, points=9)
    assert len(curve) == 9
    errors, sizes = [p.relative_error for p in curve], [p.parameters for p in curve]
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert errors[-1] == 0
    assert sizes[-1] == audited.summary.parameters


def test_patterns_hit_their_own_module_only() -> None:
    pairs = {
        f"model.layers.{layer}.q_proj": planted(values, 20, 20, seed=layer)
        for layer, values in ((1, [1.0, 0.9]), (11, [1.0, 0.001]), (2, [1.0, 0.8]))
    }
    plan: RankPlan = suggest(audit(adapter(pairs, scale=1.5)).adapters[0], tol=0.1)
    assert plan.ranks == dict(zip(pairs, [2, 1, 2], strict=True))
    (pattern,) = plan.peft["rank_pattern"]
    hits = [name for name in pairs if re.match(rf"(.*\.)?({pattern})$", name)]
    assert hits == ["model.layers.11.q_proj"]
    assert (plan.peft["r"], plan.peft["lora_alpha"]) == (2, 3)
    assert plan.peft["alpha_pattern"] == {pattern: 1.5}
    assert plan.peft["use_rslora"] is False


def _left(wanted: list[Candidate], ranks: Any) -> float:
    return sum(float(c.energy[rank:].sum()) for c, rank in zip(wanted, ranks, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_plans_are_the_best_there_are_or_near_them(seed: int) -> None:
    random = np.random.default_rng(seed)
    wanted = [
        Candidate(
            str(place),
            6,
            1.0,
            int(random.choice([64, 128, 160, 256, 640])),
            np.sort(random.lognormal(0, 1, (1, 6)))[:, ::-1] * random.uniform(0.3, 2),
        )
        for place in range(4)
    ]
    every = list(itertools.product(range(1, 7), repeat=4))
    costs = [sum(c.cost * rank for c, rank in zip(wanted, ranks, strict=True)) for ranks in every]
    lefts = [_left(wanted, ranks) for ranks in every]
    total = _left(wanted, [0] * 4)
    for tol in (0.05, 0.1, 0.3):
        best = min(c for c, left in zip(costs, lefts, strict=True) if left <= tol**2 * total)
        ranks = within_error(wanted, tol)
        assert _left(wanted, ranks) <= tol**2 * total * (1 + 1e-9)
        assert sum(c.cost * rank for c, rank in zip(wanted, ranks, strict=True)) <= 1.05 * best
    for share in (0.4, 0.6, 0.8):
        budget = int(share * max(costs))
        least = min(left for c, left in zip(costs, lefts, strict=True) if c <= budget)
        assert _left(wanted, within_budget(wanted, budget)) <= least * (1 + 1e-9)
