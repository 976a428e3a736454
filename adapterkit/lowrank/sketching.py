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
from adapterkit.lowrank.products import Array, LowRank
from adapterkit.lowrank.ranks import within

if TYPE_CHECKING:
    from collections.abc import Iterator

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
class _Range:
    """What some passes over M know.

    Attributes:
        basis: Q (in, k), orthonormal.
        images: M · Q.
        returns: Mᵀ · M · Q.
        squared: ‖M‖²; None if a pass does not tell.
        passes: how many there were.
        last: whether no more will come.
    """

    basis: Array
    images: Array
    returns: Array
    squared: float | None
    passes: int
    last: bool


def _ranges(operator: Operator | Plane, block: Array, *, growing: bool) -> Iterator[_Range]:
    """Yield what each pass finds, from an orthonormal block (in, p); a dozen at most.

    Args:
        operator: M.
        block: where to begin.
        growing: whether the directions of earlier passes are kept.
    """
    known: list[tuple[Array, Array, Array]] = []
    for passes in range(1, _PASSES + 1):
        images, returns, squared = operator.pulled(block)
        known = [*(known if growing else []), (block, images, returns)]
        basis, seen, back = (np.concatenate(part, axis=1) for part in zip(*known, strict=True))
        width = min(block.shape[1], min(operator.shape) - basis.shape[1]) if growing else None
        last = passes == _PASSES or width == 0
        yield _Range(basis, seen, back, squared, passes, last)
        if last:
            return
        block = _orthonormal(returns) if width is None else _beyond(returns[:, :width], basis)


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
    smaller = min(operator.shape)
    count = min(count, smaller)
    if smaller <= _WHOLE:
        return _whole(operator, count)
    random = np.random.default_rng(_SEED)
    first = _orthonormal(random.standard_normal((operator.shape[1], count + _EXTRA)))
    for found in _ranges(operator, first, growing=True):
        triplets = _ritz(found, count)
        enough = found.passes > 1 and float(triplets.residuals.max()) <= tolerance
        if enough or found.last:
            return triplets
    raise AssertionError  # the last range has returned


def _whole(operator: Operator, count: int) -> Triplets:
    left, values, right = np.linalg.svd(operator.plane.dense(), full_matrices=False)
    zero = np.zeros(count)
    return Triplets(values[:count], left[:, :count], right[:count].T, zero)


def _ritz(found: _Range, count: int) -> Triplets:
    """Return the triplets that MᵀM has within the basis."""
    squares, vectors = np.linalg.eigh(found.images.T @ found.images)
    values = np.sqrt(np.maximum(squares[::-1][:count], 0.0))
    chosen = vectors[:, ::-1][:, :count]
    scale = np.where(values > 0, values, 1.0)
    left, right = found.images @ chosen / scale, found.basis @ chosen
    apart = found.returns @ chosen / scale - right * values
    top = float(values[0]) or 1.0
    return Triplets(values, left, right, np.linalg.norm(apart, axis=0) / top)


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
    first = _orthonormal(directions[: min(plane.shape)].T)
    for found in _ranges(plane, first, growing=False):
        u, values, vt = np.linalg.svd(found.images, full_matrices=False)
        residuals = found.returns @ vt.T - (found.basis @ vt.T) * values**2
        squared = found.squared or 0.0
        lacking = max(squared - float(np.sum(values[:rank] ** 2)), 1e-14 * squared)
        enough = found.passes > 1 and _gain(values, residuals, rank, floor) <= _GAIN * lacking
        if enough or found.last:
            return u, values, vt @ found.basis.T, squared
    raise AssertionError  # the last range has returned


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
