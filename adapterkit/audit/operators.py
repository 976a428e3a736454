"""A weight and its update as linear maps: products with a few vectors, nothing else is formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapterkit.audit.spectrum import Array

if TYPE_CHECKING:
    from collections.abc import Iterator

Weight = NDArray[np.floating[Any]]

# Rows at a time where a float64 copy is needed: a few megabytes, whatever the weight is.
_BLOCK = 1 << 19


@dataclass(frozen=True, slots=True)
class Operator:
    """X ↦ D · (W + L · R) · X - [minus] W · X.

    Attributes:
        weight: W, (out, in), float32 or float64; products are in its type.
        left: L = s · B, (out, r), float64; None for W alone.
        right: R = A, (r, in), float64.
        rows: diagonal of D, (out,); None for the identity.
        minus: whether W itself is taken off: the update of a DoRA.
    """

    weight: Weight
    left: Array | None = None
    right: Array | None = None
    rows: Array | None = None
    minus: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    def times(self, columns: Array) -> Array:
        """Return M · X, (out, p) of X (in, p)."""
        plain = _product(self.weight, columns)
        result = plain.copy()
        if self.left is not None and self.right is not None:
            result += self.left @ (self.right @ columns)
        if self.rows is not None:
            result *= self.rows[:, None]
        return result - plain if self.minus else result

    def transposed_times(self, columns: Array) -> Array:
        """Return Mᵀ · Y, (in, p) of Y (out, p)."""
        scaled = columns if self.rows is None else columns * self.rows[:, None]
        result = _product(self.weight.T, scaled - columns if self.minus else scaled)
        if self.left is not None and self.right is not None:
            result += self.right.T @ (self.left.T @ scaled)
        return result

    def blocks(self) -> Iterator[Array]:
        """Yield M as a whole, float64, some rows at a time."""
        height = max(1, _BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], height):
            part = slice(start, start + height)
            plain: Array = self.weight[part].astype(np.float64)
            result = plain
            if self.left is not None and self.right is not None:
                result = plain + self.left[part] @ self.right
            if self.rows is not None:
                result = result * self.rows[part, None]
            yield result - plain if self.minus else result

    def dense(self) -> Array:
        """Return M as a whole, float64."""
        return np.concatenate(list(self.blocks()))

    def frobenius_norm(self) -> float:
        """Return ‖M‖, summed in float64."""
        return sum(float(np.vdot(block, block)) for block in self.blocks()) ** 0.5

    def row_norms(self) -> Array:
        """Return the norm of every row, (out,)."""
        return np.concatenate([np.linalg.norm(block, axis=1) for block in self.blocks()])


def _product(weight: Weight, columns: Array) -> Array:
    # A float64 operand would make numpy widen the whole weight.
    return np.asarray(weight @ columns.astype(weight.dtype), dtype=np.float64)
