"""Maps that are never held as a whole, and their leading triplets, against dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from audit_adapters import decaying
from lowrank_cases import update

from adapterkit.lowrank import operators
from adapterkit.lowrank.operators import Operator, Plane, pulled
from adapterkit.lowrank.products import LowRank
from adapterkit.lowrank.ranks import predicted_error
from adapterkit.lowrank.sketching import compressed, leading
from adapterkit.merging import elementwise

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("power", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 10])
def test_lanczos_is_as_exact_as_its_residual_says(power: float, count: int) -> None:
    random = np.random.default_rng(1)
    weight = decaying(400, 320, power) if power else random.standard_normal((400, 320))
    true = np.linalg.svd(weight, compute_uv=False)
    found = leading(Operator(weight), count, tolerance=1e-4)
    assert found.values == pytest.approx(true[:count], rel=1e-4)
    assert (found.values <= true[:count] * (1 + 1e-12)).all()
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert np.abs(true - value).min() <= (residual + 1e-12) * true[0]
    apart = weight.T @ found.left - found.right * found.values
    assert found.residuals == pytest.approx(np.linalg.norm(apart, axis=0) / true[0], abs=1e-9)


def test_lanczos_of_low_rank_and_of_nothing() -> None:
    random = np.random.default_rng(2)
    low = random.standard_normal((300, 4)) @ random.standard_normal((4, 200))
    found = leading(Operator(low), 10, tolerance=1e-3)
    assert found.values[:4] == pytest.approx(np.linalg.svd(low, compute_uv=False)[:4], rel=1e-9)
    assert (found.values[4:] < 1e-6 * found.values[0]).all()
    nothing = leading(Operator(np.zeros((300, 200))), 3, tolerance=1e-3)
    assert not nothing.values.any()
    assert not nothing.residuals.any()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_operators_are_the_matrices_that_they_stand_for(kind: Any) -> None:
    random = np.random.default_rng(4)
    weight = random.standard_normal((30, 20)).astype(kind)
    left, right = random.standard_normal((30, 3)), random.standard_normal((3, 20))
    rows = random.standard_normal(30)
    x, y = random.standard_normal((20, 4)), random.standard_normal((30, 4))
    wide = weight.astype(np.float64)
    for operator, dense in (
        (Operator(weight), wide),
        (Operator(weight, left, right), wide + left @ right),
        (Operator(weight, left, right, rows), rows[:, None] * (wide + left @ right)),
        (Operator(weight, left, right, rows, True), rows[:, None] * (wide + left @ right) - wide),  # noqa: FBT003
    ):
        assert operator.plane.dense() == pytest.approx(dense, rel=1e-12)
        assert operator.times(x) == pytest.approx(dense @ x, abs=1e-4)
        assert operator.transposed_times(y) == pytest.approx(dense.T @ y, abs=1e-4)
        assert operator.plane.norm() == pytest.approx(np.linalg.norm(dense), rel=1e-12)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_one_pass_multiplies_all_maps_of_a_weight(kind: Any) -> None:
    random = np.random.default_rng(5)
    weight = random.standard_normal((1100, 20)).astype(kind)  # more rows than a block
    left, right = random.standard_normal((1100, 3)), random.standard_normal((3, 20))
    rows = random.standard_normal(1100)
    maps = [
        Operator(weight),
        Operator(weight, left, right),
        Operator(weight, left, right, rows),
        Operator(weight, left, right, rows, minus=True),
        Operator(weight, left, right, minus=True),
    ]
    columns = [random.standard_normal((20, count)) for count in (4, 1, 3, 2, 5)]
    for operator, x, (images, returns) in zip(maps, columns, pulled(maps, columns), strict=True):
        dense = operator.plane.dense()
        close = {
            "rtol": 1e-5 if kind is np.float32 else 1e-12,
            "atol": 1e-2 if kind is np.float32 else 1e-9,
        }
        np.testing.assert_allclose(images, dense @ x, **close)
        np.testing.assert_allclose(returns, dense.T @ (dense @ x), **close)
        np.testing.assert_allclose(operator.times(x), dense @ x, **close)


class TestPlanes:
    def merged(self, monkeypatch: pytest.MonkeyPatch, *, held: int) -> Plane:
        monkeypatch.setattr(elementwise, "BLOCK", 3000)
        monkeypatch.setattr(operators, "_HELD", held)
        updates = [update(12, 500, 400, 8), update(13, 500, 400, 8)]
        spectra = [0.6 ** np.arange(8)] * 2
        updates = [LowRank(u.b * s, u.a) for u, s in zip(updates, spectra, strict=True)]
        keys = [(1, 2), (3, 4)]
        parameters = {"density": 0.5}
        self.start = np.concatenate([u.a for u in updates])
        return elementwise.merged(updates, np.ones(2), elementwise.DARE_TIES, parameters, keys)

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
            monkeypatch.setattr(operators, "_EXACT", exact_limit)
            spectrum = compressed(whole.held(), 16, self.start, (5, 6))
            b, a = spectrum.factors(16)
            error = float(np.linalg.norm(dense - b @ a))
            assert predicted_error(spectrum, 16) == pytest.approx(error, rel=1e-6)
            assert whole.distance(LowRank(b, a)) == pytest.approx(error, rel=1e-12)
            values = np.linalg.svd(dense, compute_uv=False)
            best = float(np.linalg.norm(values[16:]))
            assert best * (1 - 1e-9) <= error <= best * 1.005

    def test_small_planes_are_decomposed_as_they_are(self) -> None:
        one = update(14, 50, 30)
        whole = elementwise.merged([one], np.ones(1), elementwise.TIES, {"density": 0.3}, [(0, 0)])
        spectrum = compressed(whole, 4, one.a, (0, 0))
        wanted = np.linalg.svd(whole.dense(), compute_uv=False)
        np.testing.assert_allclose(spectrum.values, wanted[wanted > 1e-9], rtol=1e-10)
