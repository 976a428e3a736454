"""Two factors that are computed from other tensors when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from adapterkit.dtype import DType
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]


class Factors(NamedTuple):
    """An update ΔW = B · A before its scale.

    Attributes:
        a: (r, in).
        b: (out, r).
    """

    a: LazyTensor
    b: LazyTensor


def computed(shape: tuple[int, ...], values: Callable[[], Array]) -> LazyTensor:
    """Return a float32 tensor of `shape` whose float64 values are computed at every access."""
    return LazyTensor.computed(DType.F32, shape, values)


def wide(tensor: LazyTensor) -> Array:
    """Return the values in float64."""
    import numpy as np

    return np.asarray(tensor.numpy(), dtype=np.float64)


def matrices(**tensors: LazyTensor) -> None:
    """Check that every tensor has two axes.

    Raises:
        ValueError: naming the first that has not; it belongs to a convolution.
    """
    for name, tensor in tensors.items():
        if not tensor.is_matrix:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not that of a matrix")


def equal(what: str, *sizes: int) -> None:
    """Check that sizes which must agree do.

    Raises:
        ValueError: naming what disagrees.
    """
    if len(set(sizes)) > 1:
        raise ValueError(f"{what} disagree: {', '.join(map(str, sizes))}")


def compact(factors: Factors, dense: Callable[[], Array]) -> Factors:
    """Return the factors, or ΔW · 1 (1 · ΔW) where those would hold more numbers than ΔW.

    Args:
        factors: a factorisation, possibly of a rank above that of any matrix of this shape.
        dense: computes ΔW, (out, in), in float64.
    """
    import numpy as np

    rank, columns = factors.a.shape
    rows = factors.b.shape[0]
    side = min(rows, columns)
    if rank <= side:
        return factors
    unit = computed((side, side), lambda: np.eye(side))
    update = computed((rows, columns), dense)
    return Factors(update, unit) if rows <= columns else Factors(unit, update)
