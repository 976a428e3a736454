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
# The smaller side up to which a plane that can be held in float64 is decomposed as it is.
_SMALL = 256
_OVERSAMPLING = 8
_PASSES = 12
# How much of ‖M‖² beyond the wanted rank more passes may still bring in, by their own bound.
_GAIN = 5e-4


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
        b, a = update.b, update.a
        for block in self.read():
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


def compressed(plane: Plane, rank: int, start: Array, key: Key, *, floor: float = 0.0) -> Spectrum:
    """Return the leading part of the singular value decomposition of a plane.

    Small planes are decomposed as they are. Larger ones by randomised subspace iteration (Halko,
    Martinsson and Tropp 2011) from rows that the leading right-singular vectors are near, and
    `_OVERSAMPLING` random directions. It is a projection of the plane, so the norm of what it lacks
    is exactly √(‖M‖² - Σσ²), however good the subspace is. Passes end when the residuals of the
    Ritz values say that more of them would bring in next to nothing.

    Args:
        plane: (rows, columns).
        rank: how many singular values are wanted; the result has a few more.
        start: (r, columns), rows that the leading right-singular vectors are near.
        key: of the random directions.
        floor: singular values below it need not be exact, because they are noise.
    """
    if min(plane.shape) <= _SMALL and math.prod(plane.shape) <= _EXACT:
        whole = plane.dense()
        u, values, vt = np.linalg.svd(whole, full_matrices=False)
        squared = _squared(whole)
    else:
        u, values, vt, squared = _randomised(plane, rank, start, key, floor)
    kept = values > 1e-12 * values.max(initial=0.0)
    identity = np.eye(int(kept.sum()))
    return Spectrum(LowRank(u[:, kept], vt[kept]), identity, values[kept], identity, squared**0.5)


def _randomised(
    plane: Plane, rank: int, start: Array, key: Key, floor: float
) -> tuple[Array, Array, Array, float]:
    generator = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
    extra = max(rank - len(start), 0) + _OVERSAMPLING
    directions = np.concatenate([start, generator.standard_normal((extra, plane.shape[1]))])
    right = np.linalg.qr(directions[: min(plane.shape)].T)[0]
    passes = 1
    while True:
        images, pulled, squared = _pass(plane, right)
        u, values, vt = np.linalg.svd(images, full_matrices=False)
        residuals = pulled @ vt.T - (right @ vt.T) * values**2
        lacking = max(squared - float(np.sum(values[:rank] ** 2)), 1e-14 * squared)
        enough = passes > 1 and _gain(values, residuals, rank, floor) <= _GAIN * lacking
        if enough or passes == _PASSES:
            return u, values, vt @ right.T, squared
        right = np.linalg.qr(pulled)[0]
        passes += 1


def _pass(plane: Plane, right: Array) -> tuple[Array, Array, float]:
    """Return M · Q, Mᵀ · M · Q and ‖M‖² in one pass over the blocks."""
    images, pulled = np.empty((plane.shape[0], right.shape[1])), np.zeros_like(right)
    squared, row = 0.0, 0
    narrow = right.astype(np.float32)
    for block in plane.read():
        image = block @ (right if block.dtype == np.float64 else narrow)
        pulled += block.T @ image
        images[row : row + len(block)] = image
        squared += _squared(block)
        row += len(block)
    return images, pulled, squared


def _gain(values: Array, residuals: Array, rank: int, floor: float) -> float:
    """Bound what further passes would add to Σσ² of the wanted values.

    A Ritz value θ of MᵀM with residual r is within ‖r‖² / gap of an eigenvalue (Parlett 1980); the
    gap is taken to the last, oversampled value.
    """
    wanted = values[: min(rank, max(values.size - 1, 1))]
    wanted = wanted[wanted > floor]
    squares = np.einsum("ij,ij->j", residuals[:, : wanted.size], residuals[:, : wanted.size])
    last = max(float(values[-1]), floor if wanted.size else 0.0)
    gaps = np.maximum(wanted**2 - last**2, 1e-12 * float(values[0]) ** 2 + 1e-300)
    return float(np.sum(np.minimum(squares / gaps, wanted**2)))
