"""The weight of the base that an update belongs to, for passes whose result follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import BaseRequiredError, IncompatibleBaseError

if TYPE_CHECKING:
    from adapterkit.base.places import Places
    from adapterkit.model import Update
    from adapterkit.tensor import LazyTensor


def weight_of(pair: Update, weights: Places) -> LazyTensor:
    """Return the stored weight of an updated module: (out, in), turned of a Conv1D.

    Raises:
        IncompatibleBaseError: if the base has none, or one of another shape.
        BaseRequiredError: if it is quantised.
    """
    weight = weights.stored(pair.module)
    if weight is None:
        message = f"is not in {weights.base.path}; is it the right base?"
        raise IncompatibleBaseError(message, where=pair.module)
    if not weight.dtype.floating or weight.dtype.quantised or weight.dtype.scaled:
        raise BaseRequiredError(
            f"is stored as {weight.dtype} in {weights.base.path}; give the model before it was "
            "quantised",
            where=pair.module,
        )
    shape = weight.shape[::-1] if weights.conv1d(pair.module) else weight.shape
    if shape != pair.shape:
        here, there = (" x ".join(map(str, sizes)) for sizes in (shape, pair.shape))
        raise IncompatibleBaseError(
            f"the base has {here} here, the adapter {there}", where=pair.module
        )
    return weight
