"""The leading singular triplets of what is too large to decompose, and how exact they are.

One range finder serves all: from a block of vectors Ω, a pass over the map M gives M·Ω and MᵀM·Ω,
whose span holds the leading directions better. Kept is the last block alone, subspace iteration
(Halko, Martinsson and Tropp 2011), or all of them, block Golub-Kahan-Lanczos with full
reorthogonalisation (Golub and Kahan 1965; bounds: Musco and Musco 2015), which needs fewer passes
and more memory. Singular values are those of a projection of M: never more than the true ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.lowrank.decomposition import Decomposition
from adapterkit.lowrank.operators import pulled
from adapterkit.lowrank.products import Array, LowRank
from adapterkit.lowrank.ranks import within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.lowrank.operators import Operator, Plane

    Key = tuple[int, int]

_PASSES = 12
# Vectors beyond those asked for, so that the last of them converges as fast as the first.
_EXTRA, _OVERSAMPLING = 6, 8
# The smaller side of a map, and of a plane that float64 can hold, up to which it is decomposed as
# a whole.
_WHOLE, _SMALL = 128, 256
_SEED = 20_261
# How much of ‖M‖² beyond the wanted rank more passes may still bring in, by their own bound.
_GAIN = 5e-4


@dataclass(frozen=True, slots=True)
class Triplets:
    """The k largest singular values of M with their vectors: M·v = σ·u.

    Attributes:
        values: (k,) descending; never more than the true ones.
        left: (out, k), orthonormal.
        right: (in, k), orthonormal.
        residuals: (k,) ‖Mᵀu - σv‖ / σ₁: some singular value of M is within this of σ / σ₁.
    """

    values: Array
    left: Array
    right: Array
    residuals: Array


def leading(operator: Operator, count: int, *, tolerance: float) -> Triplets:
    """Return the `count` largest triplets, or all where there are fewer.

    Args:
        operator: M.
        count: how many.
        tolerance: stops when every residual is below this, or after twelve passes.
    """
    return leading_together([operator], count, tolerance=tolerance)[0]


def leading_together(
    operators: Sequence[Operator], count: int, *, tolerance: float
) -> list[Triplets]:
    """Return the `count` largest triplets of maps that share their weight, read once for all.

    Args:
        operators: maps M of one W.
        count: how many of each.
        tolerance: as `leading`.
    """
    if min(operators[0].shape) <= _WHOLE:
        return [_whole(operator, count) for operator in operators]
    searches = [_Search(each.shape, count) for each in operators]
    while asked := [
        (place, each.block) for place, each in enumerate(searches) if each.block is not None
    ]:
        products = pulled([operators[place] for place, _ in asked], [block for _, block in asked])
        for (place, block), found in zip(asked, products, strict=True):
            searches[place].take(block, *found, tolerance)
    return [each.found for each in searches]


class _Search:
    """Leading triplets of M, found pass by pass in all that the passes have seen.

    Attributes:
        block: what M is to be multiplied with next, orthonormal (in, p); None when all is found.
        found: the triplets by what is known.
    """

    block: Array | None
    found: Triplets

    def __init__(self, shape: tuple[int, int], count: int) -> None:
        """Begin with random directions."""
        rows, columns = shape
        self._smaller, self._count, self._passes = min(shape), min(count, *shape), 0
        width = self._count + _EXTRA
        self._known = 0
        self._basis, self._returns = np.empty((columns, 0)), np.empty((columns, 0))
        self._images, self._gram = np.empty((rows, 0)), np.empty((0, 0))
        random = np.random.default_rng(_SEED)
        self.block = _orthonormal(random.standard_normal((columns, width)))

    def take(self, block: Array, images: Array, returns: Array, tolerance: float) -> None:
        """Learn what M · block and Mᵀ · M · block are, of the block that was asked for."""
        before, now = self._known, self._known + block.shape[1]
        self._basis = _with_columns(self._basis, before, block)
        self._images = _with_columns(self._images, before, images)
        self._returns = _with_columns(self._returns, before, returns)
        shared = self._images[:, :now].T @ images
        gram = np.empty((now, now))
        gram[:before, :before], gram[:, before:], gram[before:, :] = self._gram, shared, shared.T
        self._gram = gram
        self._known, self._passes = now, self._passes + 1
        self.found = self._ritz()
        enough = self._passes > 1 and float(self.found.residuals.max()) <= tolerance
        width = min(block.shape[1], self._smaller - now)
        if enough or self._passes == _PASSES or width <= 0:
            self.block = None
        else:
            self.block = _beyond(returns[:, :width], self._basis[:, :now])

    def _ritz(self) -> Triplets:
        """Return the triplets that MᵀM has within the basis."""
        basis, images, returns = (
            each[:, : self._known] for each in (self._basis, self._images, self._returns)
        )
        squares, vectors = np.linalg.eigh(self._gram)
        values = np.sqrt(np.maximum(squares[::-1][: self._count], 0.0))
        chosen = vectors[:, ::-1][:, : self._count]
        scale = np.where(values > 0, values, 1.0)
        left, right = images @ chosen / scale, basis @ chosen
        apart = returns @ chosen / scale - right * values
        top = float(values[0]) or 1.0
        return Triplets(values, left, right, np.linalg.norm(apart, axis=0) / top)


def _whole(operator: Operator, count: int) -> Triplets:
    left, values, right = np.linalg.svd(operator.plane.dense(), full_matrices=False)
    values = values[:count]
    return Triplets(values, left[:, :count], right[:count].T, np.zeros_like(values))


def _with_columns(known: Array, count: int, more: Array) -> Array:
    """Return the first columns with more beside them, in place where there is room.

    Columns lie one after the other, and room doubles: what is copied stays less than what is known.
    """
    now = count + more.shape[1]
    if now > known.shape[1]:
        wider = np.empty((len(more), max(now, 2 * count)), order="F")
        wider[:, :count] = known[:, :count]
        known = wider
    known[:, count:now] = more
    return known


def _beyond(block: Array, basis: Array) -> Array:
    """Return what a block adds to a basis; twice is enough (Parlett 1980)."""
    for _ in range(2):
        block = _orthonormal(block - basis @ (basis.T @ block))
    return block


def _orthonormal(block: Array) -> Array:
    return np.asarray(np.linalg.qr(block)[0], dtype=np.float64)


def compressed(
    plane: Plane, rank: int, start: Array, key: Key, *, floor: float = 0.0
) -> Decomposition:
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
    if min(plane.shape) <= _SMALL and plane.exact:
        whole = plane.dense()
        u, values, vt = np.linalg.svd(whole, full_matrices=False)
        squared = float(np.vdot(whole, whole))
    else:
        u, values, vt, squared = _randomised(plane, rank, start, key, floor)
    kept = values > 1e-12 * values.max(initial=0.0)
    identity = np.eye(int(kept.sum()))
    update = LowRank(u[:, kept], vt[kept])
    return Decomposition(update, identity, values[kept], identity, squared**0.5)


def compressed_within(
    plane: Plane, tolerance: float, start: Array, key: Key, *, floor: float = 0.0
) -> Decomposition:
    """Return as much of the decomposition of a plane as leaves a relative error up to a tolerance.

    Ranks are tried from that of `start`, each twice the last, with the directions found so far.

    Args:
        plane: (rows, columns).
        tolerance: ‖M - M_k‖ / ‖M‖, Frobenius; at 0 everything is wanted.
        start: as `compressed`, like the next two.
        key: see above.
        floor: see above.
    """
    whole = min(plane.shape)
    rank = min(max(len(start), 1), whole) if tolerance else whole
    while True:
        found = compressed(plane, rank, start, key, floor=floor)
        if rank == whole or within(tolerance, [found]) is not None:
            return found
        rank, start = min(2 * rank, whole), found.vectors[1]


def _randomised(
    plane: Plane, rank: int, start: Array, key: Key, floor: float
) -> tuple[Array, Array, Array, float]:
    generator = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
    extra = max(rank - len(start), 0) + _OVERSAMPLING
    directions = np.concatenate([start, generator.standard_normal((extra, plane.shape[1]))])
    block = _orthonormal(directions[: min(plane.shape)].T)
    for passes in range(1, _PASSES + 1):
        images, returns, squared = plane.pulled(block)
        u, values, vt = np.linalg.svd(images, full_matrices=False)
        residuals = returns @ vt.T - (block @ vt.T) * values**2
        lacking = max(squared - float(np.sum(values[:rank] ** 2)), 1e-14 * squared)
        enough = passes > 1 and _gain(values, residuals, rank, floor) <= _GAIN * lacking
        if enough or passes == _PASSES:
            return u, values, vt @ block.T, squared
        block = _orthonormal(returns)
    raise AssertionError  # the last pass has returned


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
