"""Decompositions from factors alone, against numpy's of the dense float64 product."""

from __future__ import annotations

import numpy as np
import pytest
from lowrank_cases import CASES, Case, update

from adapterkit.lowrank.decomposition import (
    EXACT_ZERO,
    balanced,
    basis,
    decompose,
    orthogonal_triangle,
    triangle,
    triangles,
)
from adapterkit.lowrank.products import LowRank, nothing, stacked
from adapterkit.lowrank.ranks import predicted_error


def test_the_spectrum_is_that_of_the_product() -> None:
    one = update(0)
    spectrum = decompose(one)
    dense = one.b @ one.a
    wanted = np.linalg.svd(dense, compute_uv=False)[:5]
    np.testing.assert_allclose(spectrum.values, wanted, rtol=1e-13)
    assert spectrum.norm == pytest.approx(float(np.linalg.norm(dense)), rel=1e-13)
    u, vt = spectrum.vectors
    np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-13)
    np.testing.assert_allclose(u * spectrum.values @ vt, dense, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_a_truncation_is_the_best_of_its_rank_with_the_predicted_error(rank: int) -> None:
    one = update(1)
    spectrum = decompose(one)
    b, a = spectrum.factors(rank, scale=0.25)
    assert b.shape == (40, rank)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-12)
    u, s, vt = np.linalg.svd(one.b @ one.a)
    best = u[:, :rank] * s[:rank] @ vt[:rank]
    np.testing.assert_allclose(0.25 * b @ a, best, atol=1e-12)
    error = float(np.linalg.norm(one.b @ one.a - best))
    assert predicted_error(spectrum, rank) == pytest.approx(error, rel=1e-12, abs=1e-12)


def test_duplicates_and_cancellation_leave_no_rank_behind() -> None:
    one = update(2)
    assert decompose(stacked([one, one], [0.3, 0.7])).values.size == 5
    assert decompose(stacked([one, one], [1.0, -1.0])).values.size == 0
    assert decompose(stacked([one, one], [1.0, -1.0])).norm == 0
    assert decompose(nothing((4, 3))).values.size == 0
    # B shared, as after a split of a fused layer: the rank is that of B.
    other = LowRank(one.b, update(3).a)
    assert decompose(stacked([one, other], [1.0, 1.0])).values.size == 5


def test_lopsided_factors_lose_no_digits() -> None:
    one = update(4)
    lengths = np.logspace(-9, 9, 5)
    lopsided = LowRank(one.b * lengths, one.a / lengths[:, None])
    np.testing.assert_allclose(decompose(lopsided).values, decompose(one).values, rtol=1e-12)


def test_blocks_of_a_tall_factor_give_the_r_of_the_whole() -> None:
    tall = np.random.default_rng(5).standard_normal((5000, 7))
    for upper in (triangle(tall), orthogonal_triangle(tall)):
        np.testing.assert_allclose(upper.T @ upper, tall.T @ tall, rtol=1e-11)
    to_basis, upper = basis(tall)
    np.testing.assert_allclose((tall @ to_basis).T @ (tall @ to_basis), np.eye(7), atol=1e-13)
    np.testing.assert_allclose(tall @ to_basis @ upper, tall, atol=1e-12)


def test_balanced_factors_are_those_of_every_basis() -> None:
    one = update(8)
    mix = np.random.default_rng(9).standard_normal((5, 5))
    turned = LowRank(one.b @ np.linalg.inv(mix), mix @ one.a)
    first, second = balanced(one), balanced(turned)
    np.testing.assert_allclose(first.b @ first.b.T, second.b @ second.b.T, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_update_is_decomposed_as_the_dense_product_is(case: Case) -> None:
    one = case.update
    u, values, vt = np.linalg.svd(case.dense, full_matrices=False)
    top, parts = float(values.max(initial=0.0)), case.parts
    found = decompose(one, EXACT_ZERO)
    count = found.values.size
    np.testing.assert_allclose(found.values, values[:count], atol=1e-12 * top + 4e-15 * parts)
    assert (values[count:] <= 1e-12 * top + 1e-12 * parts).all()
    assert found.norm == pytest.approx(float(np.linalg.norm(values)), rel=1e-12, abs=1e-12 * parts)
    left, right = found.vectors
    solid = found.values > 1e-3 * top
    orthogonal = 1e-10 + (1e-15 * parts / top if top else 0.0)
    np.testing.assert_allclose(
        (left.T @ left)[solid][:, solid], np.eye(solid.sum()), atol=orthogonal
    )
    np.testing.assert_allclose(
        (right @ right.T)[solid][:, solid], np.eye(solid.sum()), atol=orthogonal
    )
    for rank in {1, 2, count}:
        b, a = found.factors(rank)
        best = u[:, :rank] * values[:rank] @ vt[:rank]
        gap = values[rank - 1] - values[rank] if rank < values.size else top
        if gap > 1e-3 * top or rank >= count:
            np.testing.assert_allclose(b @ a, best, atol=1e-10 * top + 1e-12 * parts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triangles_have_the_gram_matrices_of_the_factors(case: Case) -> None:
    for tall, upper in zip((case.update.b, case.update.a.T), triangles(case.update), strict=True):
        lengths = np.linalg.norm(tall, axis=0)
        apart = np.abs(upper.T @ upper - tall.T @ tall)
        assert (apart <= 1e-13 * np.outer(lengths, lengths)).all()


@pytest.mark.parametrize("power", [-160, -100, 100, 150])
def test_what_has_no_square_is_decomposed_all_the_same(power: int) -> None:
    one = update(20)
    size = 10.0**power
    far = decompose(LowRank(one.b * size, one.a / size), EXACT_ZERO)
    np.testing.assert_allclose(far.values, decompose(one).values, rtol=1e-12)
    long = decompose(LowRank(one.b * size, one.a))
    np.testing.assert_allclose(long.values / size, decompose(one).values, rtol=1e-12)
    assert long.norm / size == pytest.approx(decompose(one).norm, rel=1e-12)
    b, a = far.factors(5)
    np.testing.assert_allclose(b @ a, one.b @ one.a, atol=1e-12)


def test_what_is_smaller_than_any_number_is_nothing() -> None:
    one = update(21)
    tiny = LowRank(one.b * 1e-310, one.a)
    assert decompose(tiny).values.size == 0
    beside = decompose(stacked([one, tiny], [1.0, 1.0]))
    np.testing.assert_allclose(beside.values, decompose(one).values, rtol=1e-12)
