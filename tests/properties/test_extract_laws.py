"""Laws of extraction: it undoes an addition, whatever the size and the direction of that."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_pairs import Q, checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit import extract, read
from adapterkit.dtype import DType

pytestmark = pytest.mark.slow

SHAPES = st.tuples(st.integers(24, 70), st.integers(24, 70))


def extracted(old: Any, new: Any, dtype: DType = DType.F64, **settings: Any) -> tuple[Any, Any]:
    """Return the report of the one module, and B · A."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = checkpoint(folder / "base", {f"{Q}.weight": old}, dtype)
        tuned = checkpoint(folder / "tuned", {f"{Q}.weight": new}, dtype)
        report = extract(base, tuned, folder / "out", **settings)
        (pair,) = read(folder / "out").pairs()
        product = pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy().astype(float)
        return report.modules[0], product


@settings(max_examples=25)
@given(shape=SHAPES, rank=st.integers(1, 8), size=st.floats(-3, 0), seed=st.integers(0, 2**32))
def test_what_was_added_comes_back_with_its_rank(
    shape: tuple[int, int], rank: int, size: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    update = random.standard_normal((shape[0], rank)) @ random.standard_normal((rank, shape[1]))
    update *= 10**size / np.linalg.norm(update)
    weight = random.standard_normal(shape) / np.sqrt(shape[0] * shape[1])
    module, product = extracted(weight, weight + update)
    assert module.rank == rank
    assert np.linalg.norm(product - update) <= 1e-6 * np.linalg.norm(update)


@settings(max_examples=15)
@given(shape=SHAPES, rank=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_the_error_is_that_of_the_best_truncation(
    shape: tuple[int, int], rank: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    update = random.standard_normal(shape)
    module, product = extracted(np.zeros(shape), update, rank=rank)
    values = np.linalg.svd(update, compute_uv=False)
    best = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    assert abs(module.relative_error - best) <= 1e-6
    left = np.linalg.norm(update - product) / np.linalg.norm(update)
    assert abs(module.relative_error - left) <= 1e-9


@settings(max_examples=15)
@given(shape=SHAPES, power=st.integers(-6, 6), seed=st.integers(0, 2**32))
def test_size_and_direction_do_not_matter(shape: tuple[int, int], power: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    update = random.standard_normal((shape[0], 3)) @ random.standard_normal((3, shape[1])) / 100
    weight = random.standard_normal(shape)
    module, product = extracted(weight, weight + update)
    scaled, larger = extracted(weight * 2.0**power, (weight + update) * 2.0**power)
    back, minus = extracted(weight + update, weight)
    assert module.rank == scaled.rank == back.rank == 3
    size = np.linalg.norm(product)
    assert np.linalg.norm(larger / 2.0**power - product) <= 1e-6 * size
    assert np.linalg.norm(minus + product) <= 1e-6 * size
