"""Merged updates that no small rank holds: streamed by rows, compressed with a measured error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.merge.elementwise import blocks
from adapterkit.merge.lowrank import LowRank, Spectrum

if TYPE_CHECKING:
    from adapterkit.merge.elementwise import Key, Rule
    from adapterkit.merge.lowrank import Array

    Block = np.ndarray[tuple[int, int], np.dtype[np.float64 | np.float32]]

# Up to here a plane is held in float64 while it is used, and up to there in float32 (64 MB); a
# larger one is computed anew in every pass.
_EXACT = 1 << 22
_HELD = 1 << 24
# The smaller side up to which a plane is decomposed as it is.
_SMALL = 256
_OVERSAMPLING = 8
_ITERATIONS = 4


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
        whole = np.empty(self.shape, dtype=np.float64 if size <= _EXACT else np.float32)
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
        """Return the Frobenius norm of the difference to an update, block by block."""
        squared, row = 0.0, 0
        for block in self.read():
            apart = block - update.b[row : row + len(block)] @ update.a
            squared += _squared(apart)
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


def _squared(block: Block) -> float:
    wide = block.astype(np.float64, copy=False)
    return float(np.vdot(wide, wide))


def merged(
    updates: Sequence[LowRank],
    weights: Array,
    rule: Rule,
    parameters: Mapping[str, float | None],
    keys: Sequence[Key],
) -> Plane:
    """Return the plane that an elementwise rule makes of updates of one shape."""
    starts = [rule.pruner(u, parameters, key) for u, key in zip(updates, keys, strict=True)]

    def read() -> Iterator[Array]:
        filters = [start() for start in starts]
        for rows in zip(*(blocks(update) for update in updates), strict=True):
            pruned = [keep(block) for keep, block in zip(filters, rows, strict=True)]
            yield rule.combine(pruned, weights)

    return Plane(updates[0].shape, read).held()


def compressed(plane: Plane, rank: int, start: Array, key: Key) -> Spectrum:
    """Return the leading part of the singular value decomposition of a plane.

    Small planes are decomposed as they are. Larger ones by randomised subspace iteration (Halko,
    Martinsson and Tropp 2011) from the row space that the updates had before the rule and
    `_OVERSAMPLING` random directions. It is a projection of the plane, so the norm of what it lacks
    is exactly √(‖M‖² - Σσ²), however good the subspace is.

    Args:
        plane: (rows, columns).
        rank: how many singular values are wanted.
        start: (r, columns), rows that the leading right-singular vectors are near.
        key: of the random directions.
    """
    if min(plane.shape) <= _SMALL:
        u, values, vt = np.linalg.svd(plane.dense(), full_matrices=False)
    else:
        u, values, vt = _randomised(plane, rank, start, key)
    kept = values > 1e-12 * values.max(initial=0.0)
    identity = np.eye(int(kept.sum()))
    return Spectrum(LowRank(u[:, kept], vt[kept]), identity, values[kept], identity, plane.norm())


def _randomised(plane: Plane, rank: int, start: Array, key: Key) -> tuple[Array, Array, Array]:
    generator = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
    extra = max(rank - len(start), 0) + _OVERSAMPLING
    directions = np.concatenate([start, generator.standard_normal((extra, plane.shape[1]))])
    right = np.linalg.qr(directions[: min(plane.shape)].T)[0]
    for _ in range(_ITERATIONS):
        pulled = np.zeros_like(right)
        narrow = right.astype(np.float32)
        for block in plane.read():
            basis = right if block.dtype == np.float64 else narrow
            pulled += block.T @ (block @ basis)
        right = np.linalg.qr(pulled)[0]
    narrow = right.astype(np.float32)
    seen = np.concatenate(
        [np.asarray(b @ (right if b.dtype == np.float64 else narrow)) for b in plane.read()]
    ).astype(np.float64)
    u, values, vt = np.linalg.svd(seen, full_matrices=False)
    return u, values, vt @ right.T
