"""Which rank a tolerance, an energy or a number gives, against sums of squares."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from adapterkit.lowrank.decomposition import EXACT_ZERO, decompose
from adapterkit.lowrank.products import LowRank, nothing
from adapterkit.lowrank.ranks import predicted_error, rank_rule, within


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


def test_a_tail_keeps_its_digits_beside_a_large_head() -> None:
    values = np.array([10.0**-power for power in range(8)])
    found = decompose(LowRank(np.diag(values), np.eye(8)), EXACT_ZERO)
    for rank in range(8):
        wanted = float(np.linalg.norm(values[rank:][::-1]))
        assert predicted_error(found, rank) == pytest.approx(wanted, rel=1e-12)
    assert predicted_error(found, 8) == 0
    assert within(1.1e-6, [found]) == 6
