"""A frozen copy is held against a quantised table as closely as the quantisation's steps allow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.base.copies import first_other_row
from adapterkit.dtype import DType
from adapterkit.quantisation.ggml import encoded
from adapterkit.tensor import LazyTensor

ROWS, WIDTH = 24, 512
TYPES = (DType.Q8_0, DType.Q2_K, DType.Q3_K, DType.Q4_K, DType.Q5_K, DType.Q6_K)
# Change of one row of which the steps of each type tell at the latest, as a share of it.
SEEN = {"Q8_0": 0.02, "Q6_K": 0.06, "Q5_K": 0.08, "Q4_K": 0.15, "Q3_K": 0.3, "Q2_K": 0.45}


def quantised(values: np.ndarray, dtype: DType) -> LazyTensor:
    """Return a table as llama.cpp quantises it."""
    data = encoded(np.ascontiguousarray(values, np.float32), dtype)
    assert data is not None
    return LazyTensor(dtype, values.shape, lambda: data)


def table(seed: int, shape: str = "normal") -> np.ndarray:
    random = np.random.default_rng(seed)
    values = random.normal(size=(ROWS, WIDTH))
    if shape == "tails":
        values = random.standard_t(2, size=(ROWS, WIDTH))
    elif shape == "shifted":
        values = values + 3
    elif shape == "sparse":
        values[random.random((ROWS, WIDTH)) < 0.9] = 0
    elif shape == "scaled":
        values = values * np.logspace(-3, 3, ROWS)[:, None]
    elif shape == "grid":
        values = np.rint(values * 4) / 4
    values[3], values[5] = 0, 1e-4 * random.normal(size=WIDTH)
    return values.astype(np.float32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", ["normal", "tails", "shifted", "sparse", "scaled", "grid"])
@given(seed=st.integers(0, 1 << 20), stored=st.sampled_from([DType.F32, DType.F16, DType.BF16]))
@settings(max_examples=4)
def test_what_a_table_was_quantised_from_is_its_own(
    dtype: DType, shape: str, seed: int, stored: DType
) -> None:
    values = table(seed, shape)
    copy = LazyTensor.of(values).cast(stored)
    assert first_other_row(copy, quantised(values, dtype), 0, ROWS) is None
    # Quantised from what was saved in 16 bits.
    saved = copy.cast(DType.F32).numpy()
    assert first_other_row(LazyTensor.of(values), quantised(saved, dtype), 0, ROWS) is None


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", range(4))
def test_a_row_that_was_changed_a_little_is_another(dtype: DType, seed: int) -> None:
    values = table(seed)
    other = values.copy()
    noise = np.random.default_rng(seed + 100).normal(size=WIDTH)
    other[17] += SEEN[dtype.value] * noise
    table_of_base = quantised(values, dtype)
    assert first_other_row(LazyTensor.of(other), table_of_base, 0, ROWS) == 17
    # A row of zeros says that there was nothing.
    other[3] = 0.02
    assert first_other_row(LazyTensor.of(other), table_of_base, 0, ROWS) == 3
