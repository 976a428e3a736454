"""What every merge method must obey, whatever the adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import merge_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit import merge, merge_methods
from adapterkit.merging.registry import Kind

if TYPE_CHECKING:
    from adapterkit.model import AdapterTensorSet

pytestmark = pytest.mark.slow

NAMES = [spec.name for spec in merge_methods()]
SPECS = {spec.name: spec for spec in merge_methods()}
SUMS = ["svd", "linear", "task-arithmetic", "cat"]
FREE = [name for name in NAMES if not SPECS[name].basis_dependent]
# A weight times a scale is one number to these; to the others weights are shares.
LINEAR_IN_EACH = [*SUMS, "dare", "magnitude-prune", "breadcrumbs", "tsv", "iso-c-core"]
# Their singular values are equal: no update stays what it is.
FLAT = [name for name in NAMES if SPECS[name].kind is Kind.FLAT]
STRENGTHS = [name for name in NAMES if not SPECS[name].shares]
PAIRS = [name for name in NAMES if SPECS[name].adapters == (2, 2)]
MODULES = {
    "model.layers.0.self_attn.q_proj": (12, 10),
    "model.layers.0.mlp.down_proj": (9, 14),
    "model.layers.1.self_attn.q_proj": (12, 10),
}

seeds = st.integers(0, 2**20)
ranks = st.integers(1, 4)
scales = st.sampled_from([0.25, 1.0, 2.0, 8**0.5])
positive = st.floats(0.1, 2.0)
examples = settings(max_examples=12, deadline=None)


@st.composite
def parts(draw: st.DrawFn, rank: int | None = None) -> dict[str, Any]:
    """Adapt some modules, at some rank and scale."""
    chosen = draw(st.sets(st.sampled_from(sorted(MODULES)), min_size=1))
    shapes = {name: MODULES[name] for name in sorted(chosen)}
    return oracle.random_parts(draw(seeds), shapes, rank or draw(ranks), draw(scales))


@st.composite
def two(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Adapt the same modules twice and one more; of one rank, which linear-peft needs."""
    rank = draw(ranks)
    shared = dict(list(MODULES.items())[: draw(st.integers(1, 2))])
    first = oracle.random_parts(draw(seeds), shared, rank, draw(scales))
    second = oracle.random_parts(draw(seeds) + 2**20, {**shared, **dict([_LAST])}, rank)
    return first, second


_LAST = list(MODULES.items())[-1]


def run(adapters: list[AdapterTensorSet], method: str, **more: Any) -> dict[str, Any]:
    """Merge at full rank where the method has no small one; return ΔW by module."""
    if SPECS[method].kind is Kind.ELEMENTWISE and SPECS[method].space == "delta":
        more.setdefault("rank", 14)
    return oracle.deltas(merge(adapters, method=method, jobs=1, **more).adapter)


def close(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-8) -> None:
    assert found.keys() == wanted.keys()
    size = max(float(np.linalg.norm(x)) for x in wanted.values())
    for module, value in wanted.items():
        assert oracle.relative(found[module], value, floor=1e-3 * size) < tolerance, module


@pytest.mark.parametrize("method", [name for name in NAMES if name not in PAIRS])
@given(own=parts())
@examples
def test_one_adapter_alone_stays_what_it_is(method: str, own: dict[str, Any]) -> None:
    if SPECS[method].adapters[0] > 1 or method in FLAT:
        # Defined for two; with nothing else beside it the second one has no part.
        return _alone_beside_nothing(method, own)
    options = {"density": 1.0} if "density" in SPECS[method].parameters else {}
    if method.startswith("breadcrumbs"):
        options |= {"params": {"gamma": 0.0}}
    if method == "linear-peft":
        options |= {"weights": [1.0]}
    close(run([oracle.adapter(own)], method, **options), oracle.deltas(oracle.adapter(own)))
    return None


def _alone_beside_nothing(method: str, own: dict[str, Any]) -> None:
    empty = {name: (0 * b, a, s) for name, (b, a, s) in own.items()}
    pair = [oracle.adapter(own), oracle.adapter(empty)]
    wanted = oracle.deltas(pair[0])
    found = run(pair, method, weights=[1.0, 1.0])
    if method not in FLAT:
        close(found, wanted)
        return
    for module, value in wanted.items():  # the singular vectors stay, their values are made equal
        u, s, vt = np.linalg.svd(value, full_matrices=False)
        kept = s > 1e-6 * s[0]
        assert oracle.relative(found[module], s[kept].mean() * u[:, kept] @ vt[kept]) < 1e-8


@pytest.mark.parametrize("method", PAIRS)
@given(both=two())
@examples
def test_a_walk_that_does_not_start_stays(method: str, both: tuple[Any, Any]) -> None:
    first, second = (oracle.adapter(each) for each in both)
    found = run([first, second], method, weights=[1.0, 0.0])
    wanted = oracle.deltas(first)
    for module, value in oracle.deltas(second).items():
        wanted.setdefault(module, 0 * value)
    close(found, wanted)


@pytest.mark.parametrize("method", SUMS)
@given(first=parts(), second=parts(), weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
@examples
def test_sums_are_the_weighted_sum_of_any_ranks_scales_and_targets(
    method: str, first: dict[str, Any], second: dict[str, Any], weights: tuple[float, float]
) -> None:
    adapters = [oracle.adapter(first), oracle.adapter(second)]
    wanted = {
        module: sum(
            (
                w * d[module]
                for w, d in zip(weights, map(oracle.deltas, adapters), strict=True)
                if module in d
            ),
            np.zeros(MODULES[module]),
        )
        for module in {**first, **second}
    }
    found = run(adapters, method, weights=list(weights))
    sizes = [np.linalg.norm(x) for a in adapters for x in oracle.deltas(a).values()]
    for module, value in wanted.items():
        assert oracle.relative(found[module], value, floor=float(max(sizes))) < 1e-12


@pytest.mark.parametrize("method", [name for name in FREE if name not in {*FLAT, "model-stock"}])
@given(own=parts(), share=st.floats(0.1, 0.9))
@examples
def test_twice_the_same_with_shares_of_one_is_itself(
    method: str, own: dict[str, Any], share: float
) -> None:
    options = {"density": 1.0} if "density" in SPECS[method].parameters else {}
    if method.startswith("breadcrumbs"):
        options |= {"params": {"gamma": 0.0}}
    adapters = [oracle.adapter(own), oracle.adapter(own)]
    found = run(adapters, method, weights=[share, 1 - share], **options)
    wanted = oracle.deltas(adapters[0])
    if method == "tsv":  # both share one direction, and each its own half of it
        wanted = {module: value / 2 for module, value in wanted.items()}
    close(found, wanted, 1e-6)


@pytest.mark.parametrize(
    "method", ["linear", "svd", "ties", "magnitude-prune", "knots", "core-balanced"]
)
@given(own=parts())
@examples
def test_an_adapter_and_its_opposite_cancel(method: str, own: dict[str, Any]) -> None:
    adapters = [oracle.adapter(own), oracle.adapter(own)]
    found = run(adapters, method, weights=[1.0, -1.0])
    size = max(float(np.linalg.norm(x)) for x in oracle.deltas(adapters[0]).values())
    # Tiny entries, whose cancellation is rounding of the others, may take a side.
    allowed = 1e-6 if method in {"knots", "core-balanced"} else 1e-12
    assert all(float(np.linalg.norm(x)) < allowed * size for x in found.values())


@pytest.mark.parametrize("method", NAMES)
@given(both=two(), weights=st.tuples(positive, positive))
@examples
def test_the_order_of_adapters_does_not_matter(
    method: str, both: tuple[Any, Any], weights: tuple[float, float]
) -> None:
    first, second = (oracle.adapter(each) for each in both)
    close(
        run([second, first], method, weights=[weights[1], weights[0]]),
        run([first, second], method, weights=list(weights)),
    )


@pytest.mark.parametrize("method", STRENGTHS)
@given(both=two(), weights=st.tuples(positive, positive), factor=st.sampled_from([0.3, 2.0, 7.0]))
@examples
def test_weights_are_a_strength(
    method: str, both: tuple[Any, Any], weights: tuple[float, float], factor: float
) -> None:
    adapters = [oracle.adapter(each) for each in both]
    once = run(adapters, method, weights=list(weights))
    more = run(adapters, method, weights=[factor * w for w in weights])
    close(more, {module: factor * value for module, value in once.items()})


@pytest.mark.parametrize("method", STRENGTHS)
@given(both=two(), factor=st.sampled_from([0.3, 2.0, 7.0]))
@examples
def test_a_scale_may_move_into_all_weights(
    method: str, both: tuple[Any, Any], factor: float
) -> None:
    adapters = [oracle.adapter(each) for each in both]
    louder = [
        oracle.adapter({m: (b, a, factor * s) for m, (b, a, s) in each.items()}) for each in both
    ]
    close(
        run(louder, method, weights=[0.6 / factor, 0.9 / factor]),
        run(adapters, method, weights=[0.6, 0.9]),
    )


@pytest.mark.parametrize("method", LINEAR_IN_EACH)
@given(both=two(), factor=st.sampled_from([0.3, 2.0, 7.0]))
@examples
def test_a_scale_may_move_into_one_weight(
    method: str, both: tuple[Any, Any], factor: float
) -> None:
    first, second = both
    louder = {m: (b, a, factor * s) for m, (b, a, s) in first.items()}
    close(
        run([oracle.adapter(louder), oracle.adapter(second)], method, weights=[0.6 / factor, 0.9]),
        run([oracle.adapter(first), oracle.adapter(second)], method, weights=[0.6, 0.9]),
    )


def turned(own: dict[str, Any], seed: int) -> dict[str, Any]:
    """Spell the same update in another basis, of condition 10 at most."""
    rng = np.random.default_rng(seed)
    found = {}
    for module, (b, a, s) in own.items():
        left, right = (np.linalg.qr(rng.standard_normal((b.shape[1],) * 2))[0] for _ in range(2))
        mix = left * rng.uniform(0.4, 4.0, b.shape[1]) @ right
        found[module] = (b @ np.linalg.inv(mix), mix @ a, s)
    return found


@pytest.mark.parametrize("method", FREE)
@given(both=two(), seed=seeds)
@examples
def test_the_basis_of_the_factors_does_not_matter(
    method: str, both: tuple[Any, Any], seed: int
) -> None:
    plain = [oracle.adapter(each) for each in both]
    other = [oracle.adapter(turned(each, seed)) for each in both]
    close(run(other, method, weights=[0.6, 0.9]), run(plain, method, weights=[0.6, 0.9]), 1e-7)


def test_the_basis_of_the_factors_matters_to_peft() -> None:
    shapes = {"q": (12, 10)}
    first, second = (oracle.random_parts(seed, shapes, 4) for seed in (1, 2))
    flipped = {m: (-b, -a, s) for m, (b, a, s) in first.items()}
    plain, turned_sign = (
        run([oracle.adapter(each), oracle.adapter(second)], "linear-peft")["q"]
        for each in (first, flipped)
    )
    assert oracle.relative(turned_sign, plain) > 0.5


@given(both=two(), rank=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_truncation_is_optimal_and_reported_exactly(both: tuple[Any, Any], rank: int) -> None:
    adapters = [oracle.adapter(each) for each in both]
    weights = [0.7, -0.4]
    whole = run(adapters, "linear", weights=weights)
    result = merge(adapters, weights=weights, rank=rank)
    found = oracle.deltas(result.adapter)
    for module in result.report.modules:
        exact = whole[module.module]
        values = np.linalg.svd(exact, compute_uv=False)
        size = float(np.linalg.norm(values))
        error = oracle.relative(found[module.module], exact)
        best = float(np.linalg.norm(values[module.rank :])) / size
        assert abs(error - best) < 1e-9
        assert abs(module.predicted_error - best) < 1e-9
        assert abs(module.measured_error - best) < 1e-7
        assert abs(module.retained_energy - (1 - best**2)) < 1e-9


@given(both=two(), tolerance=st.floats(0.02, 0.9))
@settings(max_examples=30, deadline=None)
def test_a_tolerance_is_honoured_by_the_smallest_rank(
    both: tuple[Any, Any], tolerance: float
) -> None:
    adapters = [oracle.adapter(each) for each in both]
    whole = run(adapters, "linear")
    result = merge(adapters, rank="auto", tol=tolerance)
    for module in result.report.modules:
        values = np.linalg.svd(whole[module.module], compute_uv=False)
        tails = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1]) / np.linalg.norm(values)
        assert module.rank == len(values) or tails[module.rank] <= tolerance * (1 + 1e-9)
        assert module.rank == 1 or tails[module.rank - 1] > tolerance * (1 - 1e-9)


@pytest.mark.parametrize("method", ["dare", "dare-ties", "della", "della-linear"])
@given(both=two(), seed=st.integers(0, 2**40))
@examples
def test_random_masks_depend_on_the_seed_alone(
    method: str, both: tuple[Any, Any], seed: int
) -> None:
    adapters = [oracle.adapter(each) for each in both]
    options: dict[str, Any] = {"method": method, "rank": 14, "density": 0.5}
    once = oracle.deltas(merge(adapters, seed=seed, jobs=1, **options).adapter)
    again = oracle.deltas(merge(adapters, seed=seed, jobs=3, **options).adapter)
    other = oracle.deltas(merge(adapters, seed=seed + 1, **options).adapter)
    for module, value in once.items():
        np.testing.assert_array_equal(again[module], value)
        assert not np.array_equal(other[module], value)
    # A module is drawn for alone: leaving another one out changes nothing for it.
    module = next(iter(both[0]))
    few = [oracle.adapter({module: each[module]}) for each in both]
    alone = oracle.deltas(merge(few, seed=seed, **options).adapter)
    close(alone, {module: once[module]})


@given(both=two())
@settings(max_examples=10, deadline=None)
def test_inputs_are_not_changed(both: tuple[Any, Any]) -> None:
    adapters = [oracle.adapter(each) for each in both]
    before = [bytes(t.tobytes()) for a in adapters for t in a.tensors.values()]
    for method in FREE:
        merge(adapters, method=method)
    assert [bytes(t.tobytes()) for a in adapters for t in a.tensors.values()] == before
