"""Rounding whose errors stay away from the inputs that an adapter listens to."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.merging.into.inputs import unknown_inputs
from adapterkit.merging.into.steps import Change, Product
from adapterkit.quantisation.grids import LAYOUTS
from adapterkit.quantisation.shaped import Shape, shaped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.merging.into.operations import Operation, Sum
    from adapterkit.merging.into.rows import Place
    from adapterkit.merging.into.steps import Shaping

Array = np.ndarray[Any, np.dtype[Any]]

# Singular values below this share of the first are rounding of the factors.
_RANK = 1e-5


def shaped_changes(
    changes: Mapping[str, Change], inputs: Mapping[str, Shaping], most: float
) -> dict[str, Change]:
    """Return the changes, of which those that can be are rounded by what they listen to.

    Args:
        changes: by name.
        inputs: what is known of the inputs of a weight, by name.
        most: the largest error along an adapter's own directions that is stored.
    """
    return {
        name: replace(
            change, shaping=inputs.get(name) or unknown_inputs(change.shape[-1]), most=most
        )
        if can_be_shaped(change)
        else change
        for name, change in changes.items()
    }


def can_be_shaped(change: Change) -> bool:
    """Tell whether a change has directions of its own, and a type whose grid is known."""
    products = any(isinstance(step, Product) for step in change.steps)
    return products and change.dtype in LAYOUTS


class Rounder:
    """Rounds blocks of a change, matrix by matrix."""

    def __init__(self, change: Change, shaping: Shaping, operations: Sequence[Operation]) -> None:
        self.change, self.shaping = change, shaping
        self.sums = [found for each in operations if (found := each.products) is not None]
        # Blocks come matrix by matrix, on a few threads.
        self.shape = lru_cache(8)(self._shape)

    def rounded(self, wanted: Array, starts: Sequence[Array], place: Place) -> Array:
        """Return (rows, bytes) of which no row's error counts more than that of a start."""
        shape, _ = self.shape(place.matrix)
        return shaped(wanted, tuple(starts), self.change.dtype, shape, self.shaping.rounds)

    def seen(self, errors: Array, place: Place) -> tuple[float, float]:
        """Return the squared norms of errors along the adapter's own directions, and in outputs.

        The second is that of what errors make of the inputs, as far as these are known.
        """
        shape, count = self.shape(place.matrix)
        known = shape.directions[: count + len(self.shaping.seen)].astype(errors.dtype)
        own, seen = np.split(np.square(errors @ known.T).sum(0, dtype=np.float64), [count])
        rest = np.einsum("ij,ij->j", errors, errors) @ self.shaping.rest
        return float(own.sum()), float(seen.sum() + rest)

    def _shape(self, matrix: int) -> tuple[Shape, int]:
        """Return what counts, and how many of the directions are the adapter's own."""
        own = _directions(self.sums, matrix)
        rows = np.concatenate([own, self.shaping.seen, self.shaping.first])
        shape = Shape(rows, self.shaping.others + self.shaping.rest)
        _ = shape.feedback
        return shape, len(own)


def _directions(sums: Sequence[Sum], matrix: int) -> Array:
    """Return an orthonormal basis of the rows of ΔW, (rank, columns)."""
    left = np.concatenate([each.left[matrix] for each in sums], axis=1).astype(np.float64)
    right = np.concatenate([each.right[matrix] for each in sums], axis=0).astype(np.float64)
    outer = np.linalg.qr(left, mode="r")
    basis, inner = np.linalg.qr(right.T)
    _, values, turned = np.linalg.svd(outer @ inner.T)
    kept = int((values > _RANK * values.max(initial=0)).sum())
    return turned[:kept] @ basis.T
