"""The low-rank kernels and the streamed planes, against numpy on dense matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from adapterkit.merge import elementwise, plane
from adapterkit.merge.lowrank import (
    LowRank,
    balanced,
    basis,
    decompose,
    distance,
    gram,
    norm,
    nothing,
    stacked,
    triangle,
)
from adapterkit.merge.ranks import predicted_error, rank_rule


def update(seed: int, out: int = 40, inputs: int = 30, rank: int = 5) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.standard_normal((out, rank)), rng.standard_normal((rank, inputs)))


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
    np.testing.assert_allclose(triangle(tall).T @ triangle(tall), tall.T @ tall, rtol=1e-11)
    to_basis, upper = basis(tall)
    np.testing.assert_allclose((tall @ to_basis).T @ (tall @ to_basis), np.eye(7), atol=1e-13)
    np.testing.assert_allclose(tall @ to_basis @ upper, tall, atol=1e-12)


def test_inner_products_come_from_factors() -> None:
    one, other = update(6), update(7, rank=3)
    x, y = one.b @ one.a, other.b @ other.a
    wanted = [[np.sum(x * x), np.sum(x * y)], [np.sum(x * y), np.sum(y * y)]]
    np.testing.assert_allclose(gram([one, other]), wanted, rtol=1e-12)
    assert norm(one) == pytest.approx(float(np.linalg.norm(x)))
    assert distance(one, other) == pytest.approx(float(np.linalg.norm(x - y)))


def test_balanced_factors_are_those_of_every_basis() -> None:
    one = update(8)
    mix = np.random.default_rng(9).standard_normal((5, 5))
    turned = LowRank(one.b @ np.linalg.inv(mix), mix @ one.a)
    first, second = balanced(one), balanced(turned)
    np.testing.assert_allclose(first.b @ first.b.T, second.b @ second.b.T, atol=1e-11)


class TestRanks:
    values = (8.0, 4.0, 2.0, 1.0)

    def spectrum(self) -> Any:
        diagonal = np.diag(self.values)
        return decompose(LowRank(diagonal, np.eye(4)))

    @pytest.mark.parametrize("tolerance", [0.9, 0.5, 0.3, 0.2, 0.1, 0.0])
    def test_a_tolerance_is_met_by_the_smallest_rank(self, tolerance: float) -> None:
        whole = math.sqrt(sum(v * v for v in self.values))
        chosen = rank_rule("auto", tolerance, None).choose([self.spectrum()], 4, 1e-7)
        tails = [math.sqrt(sum(v * v for v in self.values[r:])) / whole for r in range(5)]
        assert tails[chosen] <= tolerance
        assert tails[chosen - 1] > tolerance

    def test_an_energy_is_a_tolerance(self) -> None:
        # 64 of 85 is kept by one value, 80 of 85 by two.
        for energy, rank in ((0.75, 1), (0.76, 2), (0.94, 2), (0.95, 3), (1.0, 4)):
            assert rank_rule(None, None, energy).choose([self.spectrum()], 4, 1e-7) == rank

    def test_experts_share_a_rank_and_a_tolerance(self) -> None:
        small = decompose(LowRank(np.diag([1.0, 0.9, 0.8, 0.7]), np.eye(4)))
        # Alone the small one needs rank 3 for 0.5, beside the large one its tail hardly counts.
        assert rank_rule(None, 0.5, None).choose([small], 4, 1e-7) == 3
        assert rank_rule(None, 0.5, None).choose([self.spectrum(), small], 4, 1e-7) == 2

    def test_a_given_rank_holds_for_every_module(self) -> None:
        assert rank_rule(3, None, None).choose([self.spectrum()], 4, 1e-7) == 3
        assert rank_rule(9, None, None).choose([self.spectrum()], 4, 1e-7) == 4

    def test_no_update_takes_rank_one(self) -> None:
        assert rank_rule(None, None, None).choose([decompose(nothing((4, 3)))], 4, 1e-7) == 1


class TestNthLargest:
    @pytest.mark.parametrize("sortable", [1 << 21, 64, 1])
    def test_it_is_the_one_that_sorting_gives(
        self, sortable: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(elementwise, "_SORTABLE", sortable)
        monkeypatch.setattr(elementwise, "BLOCK", 500)
        one = update(10, 60, 50)
        ordered = np.sort(np.abs(np.concatenate(list(elementwise.blocks(one)))), axis=None)[::-1]
        for place in (1, 2, 17, 600, 1499, 2999):
            assert elementwise.nth_largest(one, place) == ordered[place - 1]

    def test_equal_entries_need_no_sorting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(elementwise, "_SORTABLE", 4)
        flat = LowRank(np.full((30, 1), 0.1), np.full((1, 20), 0.3))
        assert elementwise.nth_largest(flat, 5) == 0.1 * 0.3

    def test_the_ends_keep_nothing_and_everything(self) -> None:
        one = update(11)
        assert elementwise.nth_largest(one, 0) == math.inf
        assert elementwise.nth_largest(one, 40 * 30) == 0.0


class TestPlanes:
    def merged(self, monkeypatch: pytest.MonkeyPatch, *, held: int) -> plane.Plane:
        monkeypatch.setattr(elementwise, "BLOCK", 3000)
        monkeypatch.setattr(plane, "_HELD", held)
        updates = [update(12, 500, 400, 8), update(13, 500, 400, 8)]
        spectra = [0.6 ** np.arange(8)] * 2
        updates = [LowRank(u.b * s, u.a) for u, s in zip(updates, spectra, strict=True)]
        keys = [(1, 2), (3, 4)]
        parameters = {"density": 0.5}
        self.start = np.concatenate([u.a for u in updates])
        return plane.merged(updates, np.ones(2), elementwise.DARE_TIES, parameters, keys)

    @pytest.mark.parametrize("held", [0, 1 << 24])
    def test_every_pass_sees_the_same_entries(
        self, held: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = self.merged(monkeypatch, held=held)
        first, second = whole.dense(), whole.dense()
        np.testing.assert_array_equal(first, second)
        assert whole.norm() == pytest.approx(float(np.linalg.norm(first)), rel=1e-12)

    def test_holding_a_plane_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        streamed = self.merged(monkeypatch, held=0).dense()
        held = self.merged(monkeypatch, held=1 << 24).dense()
        np.testing.assert_array_equal(streamed, held)

    def test_compression_is_near_the_best_and_its_error_is_known(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = self.merged(monkeypatch, held=1 << 24)
        dense = whole.dense()
        for exact_limit in (1 << 22, 0):  # held in float64, and in float32
            monkeypatch.setattr(plane, "_EXACT", exact_limit)
            spectrum = plane.compressed(whole.held(), 16, self.start, (5, 6))
            b, a = spectrum.factors(16)
            error = float(np.linalg.norm(dense - b @ a))
            assert predicted_error(spectrum, 16) == pytest.approx(error, rel=1e-6)
            assert whole.distance(LowRank(b, a)) == pytest.approx(error, rel=1e-12)
            values = np.linalg.svd(dense, compute_uv=False)
            best = float(np.linalg.norm(values[16:]))
            assert best * (1 - 1e-9) <= error <= best * 1.005

    def test_small_planes_are_decomposed_as_they_are(self) -> None:
        one = update(14, 50, 30)
        whole = plane.merged([one], np.ones(1), elementwise.TIES, {"density": 0.3}, [(0, 0)])
        spectrum = plane.compressed(whole, 4, one.a, (0, 0))
        wanted = np.linalg.svd(whole.dense(), compute_uv=False)
        np.testing.assert_allclose(spectrum.values, wanted[wanted > 1e-9], rtol=1e-10)
