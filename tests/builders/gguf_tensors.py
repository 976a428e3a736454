"""Tensors of every type that GGUF has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from adapterkit.dtype import DType


def tensor(dtype: DType, *shape: int, seed: int = 0) -> LazyTensor:
    """Make a tensor of random values, or of random bits where there is no encoder."""
    random = np.random.default_rng(seed)
    if dtype.quantised:
        data = random.bytes(dtype.nbytes(shape))
        return LazyTensor(dtype, shape, lambda: data)
    return LazyTensor.of(random.normal(0, 9, shape).astype(dtype.numpy()), dtype)
