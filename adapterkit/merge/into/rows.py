"""Rows of stored tensors, read as byte ranges into memory that is used again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.base.decoding import RowReader
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

    A byte range of a file is read in parts, and so is what is decoded by rows; anything else is
    read once, whole.
    """
    width = tensor.dtype.nbytes((columns,))
    span = tensor.read
    if isinstance(span, FileSlice):

        def ranged(begin: int, end: int) -> LazyTensor:
            part = FileSlice(span.path, span.offset + begin * width, (end - begin) * width)
            return LazyTensor(tensor.dtype, (end - begin, columns), part)

        return ranged
    if isinstance(span, RowReader):
        times = columns // tensor.shape[-1]

        def by_rows(begin: int, end: int) -> LazyTensor:
            part = partial(span.rows, begin * times, end * times)
            return LazyTensor(tensor.dtype, (end - begin, columns), part)

        return by_rows
    data = memoryview(tensor.tobytes()).cast("B")

    def held(begin: int, end: int) -> LazyTensor:
        part = data[begin * width : end * width]
        return LazyTensor(tensor.dtype, (end - begin, columns), lambda: part)

    return held


def decoded(tensor: LazyTensor, kind: np.dtype[Any]) -> Array:
    """Return the values as `kind`."""
    return np.asarray(tensor.numpy(), dtype=kind)
