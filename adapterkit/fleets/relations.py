"""Copies, near copies and sums among unit sketches, all against all, in blocks.

What decides is the distance d = ‖ΔW₁/‖ΔW₁‖ ∓ ΔW₂/‖ΔW₂‖‖: the sketch is linear, so d is right to a
few hundredths of itself, while 1 - cos loses all digits near 0. Sums of known adapters are found by
orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.lowrank.fingerprints import COSINE_ERROR

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from adapterkit.lowrank.products import Array

# Up to these distances an update is the same, the same after storage in 8 to 16 bits, a near copy.
SAME, ROUNDED, NEAR = 1e-4, 6e-3, 0.12
# Cosines of near copies are above it, those of all else below; what is between is looked at.
_CANDIDATE = 0.9
# No independent adapter among some thousands comes nearer; a parent that does carries as much.
_PARENT = 5.5 * COSINE_ERROR
_MOST_PARENTS = 6
# What a sum of known adapters leaves unexplained: of independent ones at least 0.77.
_EXPLAINED = 0.35
# Parents with larger cosines are stages of one training, each nearly the mean of its neighbours.
_STAGES = 0.5
# Weights below this share of the largest are what the search tried on the way.
_SMALL = 0.05
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Twin:
    """One sketch that is nearly a multiple of an earlier one, with the sign and the distance."""

    index: int
    of: int
    sign: int
    distance: float


@dataclass(frozen=True, slots=True)
class Sum:
    """One unit sketch as a sum of others, and the norm of what is left."""

    index: int
    parents: tuple[int, ...]
    weights: tuple[float, ...]
    residual: float


def twins(vectors: Array) -> Iterator[Twin]:
    """Yield for every row the nearest of the rows before it, where that is a near copy.

    Args:
        vectors: (N, K), of unit length but for the error of a sketch.
    """
    narrow = vectors.astype(np.float32)
    lengths = np.linalg.norm(narrow, axis=1)
    for start in range(0, len(narrow), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(narrow)))
        inner = narrow[block] @ narrow[: block.stop].T
        near = np.abs(inner) > _CANDIDATE * np.outer(lengths[block], lengths[: block.stop])
        rows, columns = np.nonzero(near)
        earlier = columns < rows + start
        yield from _nearest(vectors, rows[earlier] + start, columns[earlier])


def _nearest(vectors: Array, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Iterator[Twin]:
    for row in np.unique(rows):
        others = columns[rows == row]
        signs = np.where(vectors[others] @ vectors[row] < 0, -1, 1)
        apart = np.linalg.norm(vectors[others] * signs[:, None] - vectors[row], axis=1)
        best = int(np.argmin(apart))
        if apart[best] < NEAR:
            yield Twin(int(row), int(others[best]), int(signs[best]), float(apart[best]))


def sums(vectors: Array, known: Sequence[int]) -> list[Sum]:
    """Return which rows are sums of others, each set of rows told once, as its most even sum.

    Where c = a + b, a is c - b as well: the sum with positive weights is meant.

    Args:
        vectors: (N, K), unit sketches.
        known: rows of which sums are made, no two of them copies.
    """
    rows = np.asarray(known, dtype=np.intp)
    chosen = vectors[rows]
    lengths = np.linalg.norm(chosen, axis=1)
    narrow = (chosen / lengths[:, None]).astype(np.float32)
    best: dict[frozenset[int], Sum] = {}
    for start in range(0, len(rows), _BLOCK):
        cosines = np.abs(narrow[start : start + _BLOCK] @ narrow.T)
        cosines[np.arange(len(cosines)), np.arange(len(cosines)) + start] = 0
        for place in np.flatnonzero(cosines.max(axis=1, initial=0) > _PARENT) + start:
            found = _pursued(chosen, narrow, int(place))
            if found is None:
                continue
            parents = tuple(int(rows[parent]) for parent in found.parents)
            told = Sum(int(rows[place]), parents, found.weights, found.residual)
            members = frozenset({told.index, *parents})
            if members not in best or min(told.weights) > min(best[members].weights):
                best[members] = told
    return sorted(best.values(), key=lambda each: each.index)


def _pursued(chosen: Array, narrow: NDArray[np.float32], place: int) -> Sum | None:
    """Return a row as a sum of two or more others; None if they do not explain it."""
    target = chosen[place]
    picked: list[int] = []
    weights: Array = np.zeros(0)
    rest: Array = target
    while len(picked) < _MOST_PARENTS and float(np.linalg.norm(rest)) > ROUNDED:
        gains = np.abs(narrow @ rest.astype(np.float32))
        gains[[place, *picked]] = 0
        picked.append(int(np.argmax(gains)))
        weights = _solved(chosen[picked], target)
        rest = target - weights @ chosen[picked]
    kept = [i for i, weight in enumerate(weights) if abs(weight) > _SMALL * np.abs(weights).max()]
    parents = [picked[i] for i in kept]
    weights = _solved(chosen[parents], target)
    residual = float(np.linalg.norm(target - weights @ chosen[parents]))
    if len(parents) <= 1 or residual > _EXPLAINED:
        return None
    cosines = np.abs(narrow[parents] @ narrow[parents].T) - np.eye(len(parents))
    if residual > ROUNDED and float(cosines.max()) > _STAGES:
        return None
    return Sum(place, tuple(parents), tuple(map(float, weights)), residual)


def _solved(rows: Array, target: Array) -> Array:
    """Return the weights of rows whose sum is nearest to a target."""
    return np.asarray(np.linalg.lstsq(rows.T, target, rcond=None)[0], dtype=np.float64)
