"""Linear maps that are never held as a whole: products with a few vectors, or blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapterkit.lowrank.products import Array

if TYPE_CHECKING:
    from adapterkit.lowrank.products import LowRank

    Block = np.ndarray[tuple[int, int], np.dtype[np.float64 | np.float32]]

Weight = NDArray[np.floating[Any]]

# Up to here a plane is held in float64 while it is used, and up to there in float32 (64 MB); a
# larger one is computed anew in every pass.
_EXACT = 1 << 22
_HELD = 1 << 24
# Rows at a time where a float64 copy is needed: a few megabytes, whatever the weight is.
_BLOCK = 1 << 19
# Rows of a weight that are used several times while they are in the processor's cache.
_ROWS = 512
# Columns up to which a product is taken one by one.
_FEW = 3
_WIDE = np.float64


@dataclass(frozen=True, slots=True)
class Plane:
    """A dense (rows, columns) matrix that is read in blocks of whole rows, top to bottom.

    Attributes:
        shape: (rows, columns).
        read: starts a pass.
    """

    shape: tuple[int, int]
    read: Callable[[], Iterator[Block]]

    def held(self) -> Plane:
        """Return the same plane in memory, if it is small enough; else itself."""
        size = math.prod(self.shape)
        if size > _HELD:
            return self
        whole = np.empty(self.shape, dtype=np.float64 if self.exact else np.float32)
        row = 0
        for block in self.read():
            whole[row : row + len(block)] = block
            row += len(block)
        height = max(_EXACT // 16 // max(self.shape[1], 1), 1)
        return Plane(
            self.shape,
            lambda: (whole[at : at + height] for at in range(0, self.shape[0], height)),
        )

    def norm(self) -> float:
        """Frobenius norm."""
        return sum(_squared(block) for block in self.read()) ** 0.5

    def distance(self, update: LowRank) -> float:
        """Return the Frobenius norm of the difference to an update, block by block.

        It is not finite for an update that is not.
        """
        squared, row = 0.0, 0
        b, a = update.b, update.a
        for block in self.read():
            with np.errstate(over="ignore", invalid="ignore"):
                if block.dtype != b.dtype:
                    b, a = b.astype(block.dtype), a.astype(block.dtype)
                squared += _squared(block - b[row : row + len(block)] @ a)
            row += len(block)
        return squared**0.5

    def dense(self) -> Array:
        """Return the whole plane in float64."""
        whole = np.zeros(self.shape)
        row = 0
        for block in self.read():
            whole[row : row + len(block)] = block
            row += len(block)
        return whole

    @property
    def exact(self) -> bool:
        """Whether it is small enough to be held in float64 while it is used."""
        return math.prod(self.shape) <= _EXACT

    def pulled(self, right: Array) -> tuple[Array, Array, float]:
        """Return M · Q, Mᵀ · M · Q and ‖M‖² in one pass over the blocks."""
        images, pulled = np.empty((self.shape[0], right.shape[1])), np.zeros_like(right)
        squared, row = 0.0, 0
        narrow = right.astype(np.float32)
        for block in self.read():
            image = block @ (right if block.dtype == np.float64 else narrow)
            pulled += block.T @ image
            images[row : row + len(block)] = image
            squared += _squared(block)
            row += len(block)
        return images, pulled, squared


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

    @property
    def plane(self) -> Plane:
        """M as a whole, read in blocks of rows."""
        return Plane(self.shape, self.blocks)

    def changed(self, plain: Array, core: Array, rows: slice) -> tuple[Array, Array]:
        """Return some rows of M · Q, and what Wᵀ is multiplied by for them in Mᵀ · M · Q.

        Args:
            plain: those rows of W · Q.
            core: R · Q.
            rows: which.
        """
        image = plain if self.left is None else plain + self.left[rows] @ core
        factors = None if self.rows is None else self.rows[rows, None]
        if factors is not None:
            image = image * factors
        if self.minus:
            image = image - plain
        weighted = image if factors is None else image * factors
        return image, weighted - image if self.minus else weighted

    def row_norms(self) -> Array:
        """Return the norm of every row, (out,)."""
        return np.concatenate([np.linalg.norm(block, axis=1) for block in self.blocks()])


def pulled(operators: Sequence[Operator], columns: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Return M · Q and Mᵀ · M · Q of maps that share their weight, which is read once for all.

    A product with few columns takes as long as the weight is read and ordered for it, so a block of
    its rows is used for both products, and for all maps, while it is in the processor's cache.

    Args:
        operators: maps M of one W.
        columns: Q (in, p) for each.
    """
    weight = operators[0].weight
    kind = weight.dtype
    narrow = np.concatenate(columns, axis=1).astype(kind)
    ends = np.cumsum([0, *(each.shape[1] for each in columns)])
    parts = [slice(*each) for each in pairwise(ends.tolist())]
    images = [np.empty((weight.shape[0], each.shape[1])) for each in columns]
    returns = np.zeros((weight.shape[1], narrow.shape[1]))
    inner = [
        each.right @ q if each.right is not None else q
        for each, q in zip(operators, columns, strict=True)
    ]
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        block = weight[rows]
        product = block @ narrow
        for part, each, image, core in zip(parts, operators, images, inner, strict=True):
            plain = product[:, part].astype(np.float64)
            image[rows], product[:, part] = each.changed(plain, core, rows)
        returns += block.T @ product
    found: list[tuple[Array, Array]] = []
    for part, each, image in zip(parts, operators, images, strict=True):
        back: Array = returns[:, part]
        if each.left is not None and each.right is not None:
            scaled = image if each.rows is None else image * each.rows[:, None]
            back = back + each.right.T @ (each.left.T @ scaled)
        found.append((image, back))
    return found


def _product(weight: Weight, columns: Array) -> Array:
    # A float64 operand would make numpy widen the whole weight.
    narrow = columns.astype(weight.dtype)
    if columns.shape[1] > _FEW:
        return np.asarray(weight @ narrow, dtype=np.float64)
    # For so few it is quicker not to order the weight first.
    return np.stack([weight @ narrow[:, each] for each in range(columns.shape[1])], 1, dtype=_WIDE)


def _squared(block: Block) -> float:
    wide = block.astype(np.float64, copy=False)
    return float(np.vdot(wide, wide))
