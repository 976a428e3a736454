"""What a merge reads and stores: finite updates as they act on weights, and types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.lowrank.products import updates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.lowrank.products import LowRank
    from adapterkit.model import Update
    from adapterkit.tensor import LazyTensor

# From narrow to wide; what is not here (8 bits and blocks) is widened to float32.
_WIDTHS = (DType.BF16, DType.F16, DType.F32, DType.F64)


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
    found = acting(pair)
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


def acting(pair: Update, *, made: bool = False) -> list[LowRank]:
    """Return the update of each matrix, (out, in) or, of an embedding, (vocabulary, width).

    What a merge has made may be as small as its weights.
    """
    return [
        each.turned if pair.embedding else each
        for each in (updates(pair, 0.0) if made else updates(pair))
    ]
