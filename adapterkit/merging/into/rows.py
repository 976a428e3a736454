"""Rows of stored tensors, read as byte ranges into memory that is used again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor, RowReader

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Place:
    """Some rows of one matrix of a tensor, which may be a stack of matrices."""

    matrix: int
    start: int
    stop: int


class Unmerged(Protocol):
    """The tensor that is being changed, as far as an operation looks at it.

    Attributes:
        kind: type of the sums.
        rows: of one matrix.
        columns: of one matrix.
        steps: how many there are in all.
    """

    kind: np.dtype[Any]
    rows: int
    columns: int

    @property
    def steps(self) -> int:
        """Return how many steps there are in all."""
        ...

    def places(self) -> list[Place]:
        """Return all blocks."""
        ...

    def base_block(self, place: Place) -> Array:
        """Return the rows of the unmerged base."""
        ...


def reader(tensor: LazyTensor, columns: int) -> Callable[[int, int], LazyTensor]:
    """Return a function that gives rows [begin, end) of a tensor seen as (-1, columns).

    What cannot be read in parts is read once, whole.
    """
    held = tensor
    if not isinstance(tensor.read, (FileSlice, RowReader)):
        data = tensor.tobytes()
        held = LazyTensor(tensor.dtype, tensor.shape, lambda: data)
    times = columns // (tensor.shape[-1] if tensor.shape else 1)

    def part(begin: int, end: int) -> LazyTensor:
        found = held.rows(begin * times, end * times)
        return LazyTensor(found.dtype, (end - begin, columns), found.read)

    return part


def decoded(tensor: LazyTensor, kind: np.dtype[Any]) -> Array:
    """Return the values as `kind`."""
    return np.asarray(tensor.numpy(), dtype=kind)
