"""Between stored tensors and float64 factors: reading, checking, rounding once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.merge.lowrank import LowRank
from adapterkit.tensor import LazyTensor, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.merge.lowrank import Array
    from adapterkit.model import Update

# From narrow to wide; what is not here (8 bits and blocks) is widened to float32.
_WIDTHS = (DType.BF16, DType.F16, DType.F32, DType.F64)


def wide(tensor: LazyTensor) -> Array:
    """Return the values in float64."""
    return np.asarray(tensor.numpy(), dtype=np.float64)


def widest(tensors: Sequence[LazyTensor]) -> DType:
    """Return the type that a merged tensor is stored in: the widest of its sources.

    float16 and bfloat16 together give float32, and so do types of 8 bits and less: a merged value
    has no grid of its own.
    """
    kinds = {tensor.dtype for tensor in tensors}
    if not kinds or not kinds.issubset(_WIDTHS):
        return DType.F64 if DType.F64 in kinds else DType.F32
    if len(kinds) == 1:
        return kinds.pop()
    return DType.F64 if DType.F64 in kinds else DType.F32


def load(pair: Update, label: str) -> list[LowRank]:
    """Return the update of each expert (one where there are none), as it acts on the weight.

    Raises:
        FormatError: if a factor is not finite; names adapter and module.
    """
    found = updates(pair)
    for name, finite in (
        ("A", all(np.isfinite(u.a).all() for u in found)),
        ("B", all(np.isfinite(u.b).all() for u in found)),
    ):
        if not finite:
            half = name if not pair.embedding else {"A": "B", "B": "A"}[name]
            raise FormatError(
                f"{half} holds NaN or infinity; this adapter is broken, a diverged training run?",
                path=label,
                where=pair.module,
            )
    return found


def updates(pair: Update) -> list[LowRank]:
    """Return the update of each matrix, (out, in) or, of an embedding, (vocabulary, width)."""
    found = [(a.T, b.T) if pair.embedding else (b, a) for b, a in pair.matrices(wide)]
    return [LowRank(b * pair.scale, a, pair.scale) for b, a in found]


def stored(values: Array, dtype: DType) -> LazyTensor:
    """Round once and keep only the rounded bytes."""
    data = encode(values, dtype)
    return LazyTensor(dtype, values.shape, lambda: data)
