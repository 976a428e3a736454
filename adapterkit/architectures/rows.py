"""What rows of weights become in llama.cpp: their order, and what they are multiplied by."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adapterkit.architectures.transforms import TRANSFORMS
from adapterkit.errors import IncompatibleBaseError

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.architectures.expressions import Call
    from adapterkit.architectures.sizes import Sizes
    from adapterkit.architectures.table import WeightRule

    Index = np.ndarray[Any, np.dtype[np.intp]]


def row_order(call: Call, rows: int, sizes: Sizes, layer: int | None, module: str) -> Index:
    """Return the index map of a table's transform for this base.

    Raises:
        IncompatibleBaseError: if the rows do not divide as the base's heads demand.
    """
    arguments = tuple(int(sizes.value(text, layer)) for text in call.arguments)
    try:
        return _order(call.name, rows, arguments)
    except (ValueError, ZeroDivisionError):
        shown = ", ".join(
            f"{text} = {value}" for text, value in zip(call.arguments, arguments, strict=True)
        )
        raise IncompatibleBaseError(
            f"{rows} rows do not divide by {shown} of the base; is it the right base?",
            where=module,
        ) from None


def row_factors(
    rule: WeightRule, sizes: Sizes, layer: int | None, rows: int, module: str
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return what llama.cpp's weight carries in each row, (rows,).

    Raises:
        IncompatibleBaseError: if the stretches of the table are not these rows.
    """
    import numpy as np

    heights = [sizes.value(height, layer) for height, _ in rule.row_scales]
    if sum(heights) != rows:
        raise IncompatibleBaseError(
            f"has {rows} output rows, the base says {heights}", where=module
        )
    return np.repeat([sizes.number(factor, layer) for _, factor in rule.row_scales], heights)


@lru_cache(maxsize=64)
def _order(name: str, rows: int, arguments: tuple[int, ...]) -> Index:
    return TRANSFORMS[name](rows, *arguments)
