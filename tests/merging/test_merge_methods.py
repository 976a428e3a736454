"""Every method against its dense float64 definition."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import merge_oracle as oracle
import numpy as np
import pytest

import adapterkit
from adapterkit import merge, merge_methods, plugins
from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.merging import registry
from adapterkit.merging.registry import Kind

pytestmark = pytest.mark.slow

M = "model.layers.0.self_attn.q_proj"
SHAPE = (17, 13)
WEIGHTS = [0.7, 0.45]
GROUP = "adapterkit.merge_methods"
Dense = Callable[[Sequence[Any], Sequence[float]], Any]

EXACT: dict[str, Dense] = {
    "svd": oracle.weighted,
    "linear": oracle.weighted,
    "task-arithmetic": oracle.weighted,
    "cat": oracle.weighted,
    "slerp": oracle.slerp,
    "nuslerp": oracle.nuslerp,
    "karcher": oracle.karcher,
    "model-stock": oracle.model_stock,
    "knots": lambda x, w: oracle.knots(x, w, 0.6),
    "multislerp": oracle.multislerp,
    "core-balanced": lambda x, w: oracle.core(x, w, 0.6),
    "tsv": oracle.tsv,
    "iso-c-core": oracle.iso_c,
    "ties": lambda x, w: oracle.elected([oracle.trimmed(y, 0.6) for y in x], w),
    "magnitude-prune": lambda x, w: oracle.weighted([oracle.trimmed(y, 0.6) for y in x], w),
    "breadcrumbs": lambda x, w: oracle.weighted([oracle.crumbs(y, 0.6, 0.05) for y in x], w),
}
RANDOM = {"dare", "dare-ties", "della", "della-linear"}
# Held to the programs and papers that they come from, in test_merge_references.py.
ELSEWHERE = {"linear-peft", "core", "iso-cts-core", "cart-core", "sce", "breadcrumbs-ties"}
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"density": 0.6} for name in ("knots", "core-balanced", "ties", "magnitude-prune", "dare")
}
OPTIONS |= {
    "breadcrumbs": {"density": 0.6, "params": {"gamma": 0.05}},
    "dare-ties": {"density": 0.6},
    "della": {"density": 0.6, "params": {"epsilon": 0.2}},
    "della-linear": {"density": 0.6, "params": {"epsilon": 0.2}},
}


def related(seed: int = 3, count: int = 2) -> list[dict[str, Any]]:
    """Adapters that share a part, so that angles and signs are not those of strangers."""
    shared = oracle.random_parts(seed, {M: SHAPE}, rank=2)[M]
    made: list[dict[str, Any]] = []
    for place in range(count):
        b, a, _ = oracle.random_parts(seed + 1 + place, {M: SHAPE}, rank=2 + place)[M]
        own = (np.hstack([shared[0], b]), np.vstack([shared[1], a]), 0.5 + place)
        made.append({M: own})
    return made


def run(parts: Sequence[dict[str, Any]], weights: Sequence[float], method: str, **more: Any) -> Any:
    """Merge at the rank that holds anything, so that nothing but the method shows."""
    spec = next(spec for spec in merge_methods() if spec.name == method)
    if spec.kind is Kind.ELEMENTWISE and (more.get("space") or spec.space) == "delta":
        more["rank"] = min(SHAPE)
    adapters = [oracle.adapter(part) for part in parts]
    return merge(adapters, weights=weights, method=method, **OPTIONS.get(method, {}), **more)


def dense_parts(parts: Sequence[dict[str, Any]]) -> list[Any]:
    return [scale * b @ a for part in parts for b, a, scale in part.values()]


def test_every_method_has_a_dense_definition_here() -> None:
    assert {spec.name for spec in merge_methods()} == {*EXACT, *RANDOM, *ELSEWHERE}


@pytest.mark.parametrize("method", EXACT)
def test_equals_its_dense_definition(method: str) -> None:
    parts = related()
    result = run(parts, WEIGHTS, method)
    wanted = EXACT[method](dense_parts(parts), WEIGHTS)
    assert oracle.relative(oracle.deltas(result.adapter)[M], wanted) < 1e-10
    module = result.report.modules[0]
    assert module.norm == pytest.approx(float(np.linalg.norm(wanted)), rel=1e-10)
    assert module.measured_error < 1e-7


@pytest.mark.parametrize(
    "method", ["karcher", "model-stock", "tsv", "knots", "core-balanced", "ties"]
)
def test_equals_its_dense_definition_for_three(method: str) -> None:
    parts = related(count=3)
    weights = [0.5, 0.3, 0.4]
    result = run(parts, weights, method)
    wanted = EXACT[method](dense_parts(parts), weights)
    assert oracle.relative(oracle.deltas(result.adapter)[M], wanted) < 1e-9


@pytest.mark.parametrize("space", ["knots", "core-balanced"])
@pytest.mark.parametrize("method", ["ties", "magnitude-prune"])
def test_a_rule_in_another_space_is_applied_to_its_coordinates(method: str, space: str) -> None:
    parts = related()
    found = oracle.deltas(run(parts, WEIGHTS, method, space=space).adapter)[M]
    combine = oracle.elected if method == "ties" else oracle.weighted
    updates = dense_parts(parts)
    if space == "knots":
        u, s, vt = np.linalg.svd(np.hstack(updates), full_matrices=False)
        u, s, vt = u[:, s > 1e-7], s[s > 1e-7], vt[s > 1e-7]
        seen = np.split(s[:, None] * vt, 2, axis=1)
        wanted = u @ combine([oracle.trimmed(x, 0.6) for x in seen], WEIGHTS)
    else:
        wanted = oracle.core(updates, WEIGHTS, 0.6, combine)
    assert oracle.relative(found, wanted) < 1e-9


@pytest.mark.parametrize("method", sorted(RANDOM))
def test_every_entry_is_one_that_some_mask_gives(method: str) -> None:
    parts = related()
    updates = dense_parts(parts)
    found = oracle.deltas(run(parts, WEIGHTS, method, seed=4).adapter)[M]
    if method.startswith("della"):
        chances = [oracle.keep_chances(x, 0.6, 0.2) for x in updates]
    else:
        chances = [np.full(SHAPE, 0.6)] * 2
    combine = oracle.weighted if method in {"dare", "della-linear"} else oracle.elected
    possible = {kept: combine(x, WEIGHTS) for kept, x in oracle.masked(updates, chances)}
    size = np.abs(found).max()
    hits = {kept: np.abs(found - value) < 1e-9 * size for kept, value in possible.items()}
    assert np.logical_or.reduce(list(hits.values())).all()
    # Entry by entry independent: each update alone is seen about 0.6 · 0.4 of the time.
    for kept in ((True, False), (False, True)):
        assert 0.1 < hits[kept].mean() < 0.45


def test_random_masks_keep_their_share_and_the_expectation() -> None:
    parts = oracle.random_parts(0, {M: (120, 100)}, rank=2)
    update = parts[M][0] @ parts[M][1]
    total = np.zeros_like(update)
    for seed in range(40):
        result = merge([oracle.adapter(parts)], method="dare", density=0.25, seed=seed, rank=100)
        found = oracle.deltas(result.adapter)[M]
        kept = np.abs(found) > 1e-9 * np.abs(update)
        assert abs(kept.mean() - 0.25) < 0.02
        total += found
    # The mean of 40 draws has variance x² (1/p - 1) / 40 in each entry.
    assert oracle.relative(total / 40, update) == pytest.approx((3 / 40) ** 0.5, rel=0.05)


def test_every_module_and_expert_has_masks_of_its_own() -> None:
    b, a, _ = oracle.random_parts(0, {M: SHAPE}, rank=2)[M]
    twice = {"layers.0.q_proj": (b, a, 1.0), "layers.1.q_proj": (b, a, 1.0)}
    experts = {"experts": (np.stack([b, b]), np.stack([a, a]), 1.0)}
    options: dict[str, Any] = {"method": "dare", "density": 0.5, "rank": min(SHAPE)}
    first, second = oracle.deltas(merge([oracle.adapter(twice)], **options).adapter).values()
    assert not np.allclose(first, second)
    stacked = oracle.adapter(experts, kinds={"experts": adapterkit.Kind.EXPERTS})
    (both,) = oracle.deltas(merge([stacked], **options).adapter).values()
    assert not np.allclose(both[0], both[1])


def test_della_keeps_large_entries_more_often() -> None:
    parts = oracle.random_parts(0, {M: (400, 40)}, rank=2)
    update = parts[M][0] @ parts[M][1]
    result = merge(
        [oracle.adapter(parts)], method="della", density=0.5, params={"epsilon": 0.4}, rank=40
    )
    kept = np.abs(oracle.deltas(result.adapter)[M]) > 1e-9
    order = np.argsort(np.abs(update), axis=1)
    share = np.take_along_axis(kept, order, axis=1).mean(axis=0)
    assert share[:4].mean() == pytest.approx(0.1 + 0.8 * 1.5 / 39, abs=0.03)
    assert share[-4:].mean() == pytest.approx(0.9 - 0.8 * 1.5 / 39, abs=0.03)


def test_nuslerp_takes_weights_as_shares() -> None:
    parts = related()
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    found = oracle.deltas(run(parts, WEIGHTS, "nuslerp").adapter)[M]
    wanted = oracle.deltas(run(parts, shares, "slerp").adapter)[M]
    assert oracle.relative(found, wanted) < 1e-12
    even = oracle.deltas(run(parts, [0.0, 0.0], "nuslerp").adapter)[M]
    assert oracle.relative(even, oracle.slerp(dense_parts(parts), [0.5, 0.5])) < 1e-12


def test_directions_that_cancel_have_no_mean() -> None:
    (b, a, s), _ = (part[M] for part in related())
    signs = (1.0, 1.0, -2.0)
    apart = [oracle.adapter({M: (sign * b, a, s)}) for sign in signs]
    with pytest.raises(UnsupportedError, match=r"q_proj: the weighted directions cancel"):
        merge(apart, weights=[0.25, 0.25, 0.5], method="multislerp")
    pair = merge(apart[1:], weights=[0.5, 0.5], method="multislerp")
    assert oracle.relative(oracle.deltas(pair.adapter)[M], -0.5 * s * b @ a) < 1e-12


def test_model_stock_of_strangers_says_why_little_is_left() -> None:
    adapters = [oracle.adapter(oracle.random_parts(seed, {M: (90, 80)})) for seed in (1, 2)]
    report = merge(adapters, method="model-stock").report
    share = sum(report.modules[0].coefficients or ()) / sum(report.modules[0].weights)
    assert abs(share) < 0.1
    assert f"{abs(share):.2%} in {M}: the updates there are unrelated" in report.warnings[0]
    assert len(report.warnings) == 1


def test_breadcrumbs_without_outliers_to_drop_keeps_the_rest() -> None:
    # A slice [n:-0] would be empty and drop the whole update.
    parts = related()
    result = run(parts, WEIGHTS, "breadcrumbs")
    options: Any = {"density": 0.6, "params": {"gamma": 0.0}, "rank": min(SHAPE)}
    adapters = [oracle.adapter(part) for part in parts]
    pruned = merge(adapters, weights=WEIGHTS, method="breadcrumbs", **options)
    wanted = oracle.weighted([oracle.trimmed(x, 0.6) for x in dense_parts(parts)], WEIGHTS)
    assert oracle.relative(oracle.deltas(pruned.adapter)[M], wanted) < 1e-10
    assert oracle.relative(oracle.deltas(result.adapter)[M], wanted) > 0.1


def test_parallel_updates_are_added_on_the_straight_line() -> None:
    (b, a, s), _ = (part[M] for part in related())
    for factor in (2.0, -0.5):
        pair = [oracle.adapter({M: (b, a, s)}), oracle.adapter({M: (factor * b, a, s)})]
        result = merge(pair, weights=[0.5, 0.5], method="slerp")
        wanted = 0.5 * (1 + factor) * s * b @ a
        assert oracle.relative(oracle.deltas(result.adapter)[M], wanted) < 1e-6


def test_iso_c_core_flattens_what_the_rank_keeps() -> None:
    parts = related()
    adapters = [oracle.adapter(part) for part in parts]
    result = merge(adapters, weights=WEIGHTS, method="iso-c-core", rank=3)
    u, s, vt = np.linalg.svd(oracle.weighted(dense_parts(parts), WEIGHTS))
    wanted = s[:3].mean() * u[:, :3] @ vt[:3]
    assert oracle.relative(oracle.deltas(result.adapter)[M], wanted) < 1e-10
    with pytest.raises(UsageError, match="rank instead of tol"):
        merge(adapters, method="iso-c-core", tol=0.1)


def test_linear_peft_needs_equal_ranks() -> None:
    with pytest.raises(UnsupportedError, match=r"q_proj: .*ranks are \[4, 5\]; use linear"):
        run(related(), WEIGHTS, "linear-peft")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sum"}, "unknown method 'sum'; known: svd, linear"),
        ({"space": "core"}, "svd is the same in every space"),
        ({"method": "ties", "space": "fourier"}, "unknown space 'fourier'"),
        ({"method": "ties", "density": 1.5}, "density is 1.5"),
        ({"method": "ties", "density": 0.0}, "density is 0"),
        ({"density": 0.5}, "svd has no parameter 'density'; its parameters: none"),
        ({"method": "della", "params": {"epsilon": 0.9}}, "0.5 ± 0.9"),
        ({"method": "della", "params": {"gamma": 0.9}}, "its parameters: density, epsilon"),
        ({"seed": 1}, "svd draws nothing at random"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": "all"}, "rank is 'all'"),
        ({"rank": 3, "tol": 0.1}, "rank 3 leaves nothing for tol"),
        ({"tol": 0.1, "energy": 0.9}, "give one of them"),
        ({"tol": 1.0}, "tol is 1"),
        ({"energy": 0.0}, "energy is 0"),
        ({"method": "cat", "rank": 3}, "cat keeps every rank"),
        ({"method": "slerp", "weights": [1.0, -1.0]}, "must not be negative"),
        ({"weights": [1.0]}, "2 adapters, but 1 weight"),
        ({"weights": [1.0, float("nan")]}, "not a finite number"),
        ({"missing": "skip"}, "missing is 'skip'"),
    ],
)
def test_arguments_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("[", r"\[").replace("(", r"\(")):
        merge([oracle.adapter(part) for part in related()], **settings)


def test_a_plugin_adds_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(gram: Any, weights: Any, parameters: Any) -> Any:
        del gram
        return weights * parameters["by"]

    spec = registry.MethodSpec(
        name="halved",
        title="the sum, made smaller",
        kind=Kind.COEFFICIENTS,
        target=f"{__name__}:halved",
        parameters={"by": 0.5},
    )
    monkeypatch.setattr(sys.modules[__name__], "halved", halved, raising=False)
    entry = SimpleNamespace(load=lambda: spec)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] * (group == GROUP))
    plugins.plugged_in.cache_clear()
    try:
        parts = related()
        result = merge([oracle.adapter(part) for part in parts], method="halved")
        wanted = 0.5 * oracle.weighted(dense_parts(parts), [1.0, 1.0])
        assert oracle.relative(oracle.deltas(result.adapter)[M], wanted) < 1e-12
        assert merge_methods()[-1] is spec
    finally:
        plugins.plugged_in.cache_clear()
