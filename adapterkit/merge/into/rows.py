"""Rows of stored tensors, read as byte ranges into memory that is used again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Place:
    """Some rows of one matrix of a tensor, which may be a stack of matrices."""

    matrix: int
    start: int
    stop: int


def reader(tensor: LazyTensor, columns: int) -> Callable[[int, int], LazyTensor]:
    """Return a function that gives rows [begin, end) of a tensor seen as (-1, columns).

    A byte range of a file is read in parts; anything else is read once, whole.
    """
    width = tensor.dtype.nbytes((columns,))
    span = tensor.read
    if not isinstance(span, FileSlice):
        data = memoryview(tensor.tobytes()).cast("B")

        def part(begin: int, end: int) -> LazyTensor:
            held = data[begin * width : end * width]
            return LazyTensor(tensor.dtype, (end - begin, columns), lambda: held)

        return part

    def ranged(begin: int, end: int) -> LazyTensor:
        found = FileSlice(span.path, span.offset + begin * width, (end - begin) * width)
        return LazyTensor(tensor.dtype, (end - begin, columns), found)

    return ranged


def decoded(tensor: LazyTensor, kind: np.dtype[Any]) -> Array:
    """Return the values as `kind`."""
    return np.asarray(tensor.numpy(), dtype=kind)
