"""The kurtosis of the entries of B · A, against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.lowrank.moments import kurtosis


def by_definition(x: Any) -> float:
    apart = x - x.mean()
    return float((apart**4).mean() / (apart**2).mean() ** 2)


# Rank 2 of 90 x 70 goes by products of factors, rank 9 of 20 x 30 by blocks of B · A.
@pytest.mark.parametrize(("out", "inputs", "rank"), [(90, 70, 2), (20, 30, 9), (400, 300, 5)])
@given(seed=st.integers(0, 2**16), power=st.integers(-40, 40))
@settings(max_examples=15, deadline=None)
def test_kurtosis_is_that_of_the_entries(
    out: int, inputs: int, rank: int, seed: int, power: int
) -> None:
    random = np.random.default_rng(seed)
    a = random.standard_normal((rank, inputs)) + random.random()
    b = random.standard_normal((out, rank)) ** 3
    assert kurtosis(a * 10.0**power, b) == pytest.approx(by_definition(b @ a), rel=1e-9)


def test_kurtosis_of_special_matrices() -> None:
    signs = np.where(np.arange(12) % 2, 1.0, -1.0)
    assert kurtosis(signs[None], signs[:, None]) == pytest.approx(1)
    one = np.eye(1, 1000)
    assert kurtosis(one, np.eye(1000, 1)) == pytest.approx(1e6, rel=1e-4)
    assert kurtosis(np.ones((1, 5)), np.ones((4, 1))) is None
    assert kurtosis(np.zeros((1, 5)), np.ones((4, 1))) is None
