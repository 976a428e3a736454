"""The n-th largest entry of an update that is never held as a whole, against sorting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lowrank_cases import update

from adapterkit.lowrank.products import LowRank
from adapterkit.merging import elementwise


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
