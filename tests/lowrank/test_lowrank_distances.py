"""Norms and distances from factors, against the norms of dense float64 matrices."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from lowrank_cases import CASES, Case, gaussian

from adapterkit import DType
from adapterkit.lowrank import differences
from adapterkit.lowrank.decomposition import EXACT_ZERO, decompose
from adapterkit.lowrank.distances import cut_distance, distance, gram, inner, measured, norm
from adapterkit.lowrank.products import LowRank, nothing, stacked, updates, whole
from adapterkit.lowrank.ranks import predicted_error
from adapterkit.model import Kind, Update
from adapterkit.tensor import LazyTensor


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_norm_is_that_of_the_product(case: Case) -> None:
    wanted = float(np.linalg.norm(case.dense))
    assert norm(case.update) == pytest.approx(wanted, rel=1e-12, abs=1e-15 * case.parts)


def test_inner_products_come_from_factors() -> None:
    one, other = gaussian(6), gaussian(7, rank=3)
    x, y = one.b @ one.a, other.b @ other.a
    wanted = [[np.sum(x * x), np.sum(x * y)], [np.sum(x * y), np.sum(y * y)]]
    np.testing.assert_allclose(gram([one, other]), wanted, rtol=1e-12)
    assert inner(one, other) == pytest.approx(float(np.sum(x * y)), rel=1e-12)


def test_an_update_that_is_not_there_has_inner_products_of_zero() -> None:
    one, zero = gaussian(1), LowRank(np.zeros((60, 3)), gaussian(2, rank=3).a)
    square = norm(one) ** 2
    wanted = np.diag([square, 0.0, 0.0])
    np.testing.assert_allclose(gram([one, nothing((60, 45)), zero]), wanted, rtol=1e-12)
    for absent in (nothing((60, 45)), zero):
        assert distance(one, absent) == pytest.approx(norm(one), rel=1e-12)
        assert distance(absent, one) == pytest.approx(norm(one), rel=1e-12)
        assert inner(absent, absent) == norm(absent) == 0


SAME = [case for case in CASES if case.update.shape == (60, 45)]


@pytest.mark.parametrize(("first", "second"), list(product(SAME, SAME)), ids=str)
def test_a_distance_is_that_of_the_dense_matrices(first: Case, second: Case) -> None:
    wanted = float(np.linalg.norm(first.dense - second.dense))
    rounding = 2e-15 * (first.parts + second.parts)
    found = distance(first.update, second.update)
    assert found == pytest.approx(wanted, rel=1e-12, abs=rounding)


@pytest.mark.parametrize("share", [1e-3, 1e-8, 1e-12])
def test_close_factors_lose_nothing_to_cancellation(share: float) -> None:
    one, other = gaussian(1), gaussian(2)
    step = 2.0 ** round(math.log2(share))
    near = LowRank(one.b + step * other.b, one.a + step * other.a)
    b, a = near.b - one.b, near.a - one.a
    wanted = float(np.linalg.norm(b @ one.a + near.b @ a))
    assert distance(one, near) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("share", [1e-2, 1e-5, 1e-8])
def test_another_basis_of_a_close_update_is_as_close(share: float) -> None:
    one, other = gaussian(1), gaussian(2)
    mix = np.random.default_rng(3).standard_normal((6, 6))
    turned = LowRank(one.b @ np.linalg.inv(mix), mix @ one.a)
    sizes = float(np.linalg.norm(turned.b) * np.linalg.norm(turned.a))
    assert distance(one, turned) <= 1e-15 * sizes
    far = stacked([turned, other], [1.0, share])
    wanted = share * norm(other)
    assert distance(one, far) == pytest.approx(wanted, rel=1e-12, abs=1e-15 * sizes)


def test_a_stack_is_measured_as_a_whole() -> None:
    ones, others = [gaussian(seed) for seed in (1, 2)], [gaussian(seed) for seed in (3, 4)]
    first, second = (
        LowRank(np.stack([u.b for u in each]), np.stack([u.a for u in each]))
        for each in (ones, others)
    )
    singles = [distance(*pair) for pair in zip(ones, others, strict=True)]
    assert distance(first, second) == pytest.approx(math.hypot(*singles), rel=1e-12)
    tiny = LowRank(second.b * 1e-9, second.a)
    apart = distance(stacked([first, tiny], [1.0, 1.0]), first)
    assert apart == pytest.approx(norm(tiny), rel=1e-5)


@pytest.mark.parametrize("power", [-160, -100, 100, 150])
def test_what_has_no_square_is_measured_all_the_same(power: int) -> None:
    one, other = gaussian(1), gaussian(2)
    size = 10.0**power
    far = LowRank(one.b * size, one.a / size)
    assert norm(far) == pytest.approx(norm(one), rel=1e-12)
    assert norm(LowRank(one.b * size, one.a)) / size == pytest.approx(norm(one), rel=1e-12)
    wanted = distance(one, other)
    assert distance(far, LowRank(other.b * size, other.a / size)) == pytest.approx(
        wanted, rel=1e-12
    )


def test_broken_factors_have_no_norm_and_none_has_norm_zero() -> None:
    for value in (math.nan, math.inf):
        one = gaussian(1)
        one.b[3, 2] = value
        assert math.isnan(norm(one))
        assert math.isnan(distance(one, gaussian(2)))
        assert math.isnan(distance(gaussian(2, rank=3), one))
    assert norm(nothing((4, 3))) == distance(nothing((4, 3)), nothing((4, 3))) == 0
    assert norm(LowRank(np.zeros((4, 2)), np.ones((2, 3)))) == 0


def pair(one: LowRank, scale: float = 1.0, dtype: DType = DType.F64) -> Update:
    a, b = (LazyTensor.of(each, dtype) for each in (one.a, one.b))
    return Update("m", a, b, scale)


def test_a_difference_of_updates_is_relative_and_has_a_direction() -> None:
    one, other = gaussian(1), gaussian(2, rank=3)
    x, y = 0.5 * one.b @ one.a, -2.0 * other.b @ other.a
    found = differences.difference(pair(one, 0.5), pair(other, -2.0))
    assert found.relative_error == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), 1e-12)
    cosine = np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y)
    assert found.cosine == pytest.approx(cosine, rel=1e-12)
    assert found.norm_ratio == pytest.approx(np.linalg.norm(y) / np.linalg.norm(x), rel=1e-12)
    assert differences.norm(pair(one, 0.5)) == pytest.approx(np.linalg.norm(x), rel=1e-12)


def test_a_basis_change_is_no_difference_to_fifteen_digits() -> None:
    one = gaussian(1)
    mix = np.linalg.qr(np.random.default_rng(3).standard_normal((6, 6)))[0]
    found = differences.difference(pair(one), pair(LowRank(one.b @ mix, mix.T @ one.a)))
    assert found.relative_error < 1e-14
    assert found.cosine == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("dtype", [DType.F64, DType.F32, DType.F16, DType.BF16])
def test_stored_factors_are_read_as_they_are(dtype: DType) -> None:
    random = np.random.default_rng(0)
    b, a = (
        LazyTensor.of(random.standard_normal(shape).astype(dtype.numpy()))
        for shape in ((3, 50, 4), (3, 4, 700))
    )
    update = Update("m", a, b, 0.7, Kind.EXPERTS)
    for place, each in enumerate(updates(update)):
        np.testing.assert_array_equal(each.b, b.numpy()[place].astype(np.float64) * 0.7)
        np.testing.assert_array_equal(each.a, a.numpy()[place].astype(np.float64))
        np.testing.assert_array_equal(each.a, whole(update).a[place])


@pytest.mark.parametrize("scale", [0.5, 0.7])
def test_a_scale_in_b_is_compared_without_a_decomposition(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusion LoRAs are written so, thousands of modules each: QR of all took minutes."""

    def never(*_: object) -> float:
        raise AssertionError

    monkeypatch.setattr("adapterkit.lowrank.distances._orthogonal_norm", never)
    pair = gaussian(3, rank=4)
    a, b = (LazyTensor.of(x.astype(np.float32)) for x in (pair.a, pair.b))
    folded = LazyTensor.of((b.numpy().astype(np.float64) * scale).astype(np.float32))
    found = differences.difference(Update("m", a, b, scale), Update("m", a, folded, 1.0))
    assert found.relative_error <= (0 if scale == 0.5 else 1e-7)
    assert found.norm_ratio == pytest.approx(1)


@pytest.mark.parametrize("moved", ["a", "b", "both", "neither"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-10])
def test_near_factors_say_all_that_two_updates_do(moved: str, size: float) -> None:
    one, noise = gaussian(6), gaussian(9)
    other = LowRank(
        one.b + size * noise.b * (moved in {"b", "both"}),
        one.a + size * noise.a * (moved in {"a", "both"}),
    )
    found = measured(one, other)
    x, y = one.b @ one.a, other.b @ other.a
    assert found.norms == pytest.approx((np.linalg.norm(x), np.linalg.norm(y)), rel=1e-12)
    assert found.inner == pytest.approx(np.sum(x * y), rel=1e-12)
    # What is exactly between the rounded factors, since x - y has few digits left.
    apart = (one.b - other.b) @ one.a + other.b @ (one.a - other.a)
    assert found.distance == pytest.approx(np.linalg.norm(apart), rel=1e-12)


@pytest.mark.parametrize("rank", [6, 5, 2])
@pytest.mark.parametrize("dtype", [DType.F64, DType.F32, DType.F16, DType.BF16])
@pytest.mark.parametrize("cancel", [False, True])
def test_a_rounded_truncation_is_as_far_off_as_its_product(
    rank: int, dtype: DType, cancel: bool
) -> None:
    update = gaussian(6)
    if cancel:
        update = stacked(
            [update, LowRank(update.b * (1 + 1e-9), update.a), gaussian(4)], [1, -1, 1]
        )
    found = decompose(update, EXACT_ZERO)
    cut = LowRank(*found.factors(rank))
    kept = LowRank(*(each.astype(dtype.numpy()).astype(np.float64) for each in (cut.b, cut.a)))
    off = np.linalg.norm(update.b @ update.a - kept.b @ kept.a)
    floor = 1e-15 * float(np.linalg.norm(update.b)) * float(np.linalg.norm(update.a))
    predicted = predicted_error(found, rank)
    assert cut_distance(found, cut, kept, predicted) == pytest.approx(off, rel=1e-7, abs=floor)


def test_a_truncation_that_is_none_is_found_out() -> None:
    update = gaussian(6)
    found = decompose(update, EXACT_ZERO)
    b, a = found.factors(6)
    wrong = LowRank(b, a[::-1])
    kept = LowRank(wrong.b.astype(np.float32).astype(np.float64), wrong.a)
    off = float(np.linalg.norm(update.b @ update.a - kept.b @ kept.a))
    assert cut_distance(found, wrong, kept, 0.0) == pytest.approx(off, rel=1e-12)
