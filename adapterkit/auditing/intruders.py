"""Which leading directions of W' = W + ΔW are not W's: proven where that is cheap, else bounded.

An intruder (arXiv 2410.21228) is a left singular vector u of W' with max |cos| < ½ over all left
singular vectors of W. That needs a whole decomposition, and is done so for small weights. For large
ones a direction is familiar if it is near one of W's leading vectors, and new if no single vector
of W can hold a quarter of it. The latter is bounded by what a few Lanczos steps from u know of its
distribution over the spectrum of W · Wᵀ: no point of it can hold more than 1 / Σ p_k(x)², with the
orthonormal polynomials of those steps (Christoffel's function; Akhiezer 1965, section 2.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adapterkit.lowrank.products import Array

if TYPE_CHECKING:
    from adapterkit.lowrank.operators import Operator
    from adapterkit.lowrank.sketching import Triplets

# Directions of W' looked at, and when one is an intruder: the defaults of PEFT 0.21.2
# (reduce_intruder_dimension).
LEADING, COSINE = 10, 0.5
# What is not proven either way is taken for an intruder if W's known directions are all that it
# could be, their last value being less than this share of its own, and else by this retention.
RETENTION = 0.7
# The smaller side of a weight up to which it is decomposed where anything is left open.
_AFFORDABLE = 768
_STEPS, _POINTS = 10, 2000


Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Intruders:
    """How many of the leading directions of W' are intruders.

    Attributes:
        count: the number, or its estimate.
        least: how many are proven to be.
        most: how many are not proven not to be.
        cosines: max |cos| of each with all of W's; None where W was not decomposed.
    """

    count: int
    least: int
    most: int
    cosines: Array | None = None


def intruders(
    plain: Operator,
    changed: Operator,
    old: Triplets,
    new: Triplets,
    retention: Array,
    *,
    exact: bool,
) -> Intruders:
    """Count the intruders among the leading directions of W'.

    Args:
        plain: W.
        changed: W'.
        old: leading triplets of W, one more than are looked at.
        new: likewise of W'.
        retention: ‖Wᵀu‖ / σ of those that are looked at.
        exact: whether to decompose W and W', whatever they cost.
    """
    looked = len(retention)
    familiar, unlike = _near(old, new, looked)
    open_: Mask = np.logical_not(familiar)
    if exact or (open_.any() and min(plain.shape) <= _AFFORDABLE):
        cosines = _cosines(plain, changed)[:looked]
        count = int((cosines < COSINE).sum())
        return Intruders(count, count, count, cosines)
    strange: Mask = np.zeros(looked, dtype=np.bool_)
    if open_.any():
        most = _largest_shares(plain, new.left[:, :looked][:, open_], float(old.values[0]))
        strange[open_] = np.sqrt(most) + unlike[open_] < COSINE
    open_ = np.logical_and(open_, np.logical_not(strange))
    apart = float(old.values[-1]) < RETENTION * new.values[:looked]
    guessed = int((open_ & (apart | (retention < RETENTION))).sum())
    least = int(strange.sum())
    return Intruders(least + guessed, least, least + int(open_.sum()))


def _near(old: Triplets, new: Triplets, looked: int) -> tuple[Mask, Array]:
    """Return which directions of W' are certainly W's, and how far each may be from the true one.

    A singular vector is right to its residual over the gap to the next value, so a cosine with a
    computed one is right to the sum of both.
    """
    ours, theirs = _angles(new)[:looked], _angles(old)
    cosines = np.abs(new.left[:, :looked].T @ old.left) - ours[:, None] - theirs
    return np.asarray(cosines.max(axis=1) >= COSINE, dtype=np.bool_), ours


def _angles(found: Triplets) -> Array:
    """Return bounds of the angles to the true vectors; of the last one nothing is known."""
    values = found.values
    gaps = -np.diff(values)
    before, after = np.append(np.inf, gaps), np.append(gaps, 0.0)
    room = np.minimum(before, after)
    errors = 2**0.5 * found.residuals * float(values[0])
    return np.asarray(np.where(errors < room, errors / np.where(room > 0, room, 1.0), 1.0))


def _largest_shares(plain: Operator, directions: Array, top: float) -> Array:
    """Bound, of each unit direction (out, k), the share that any one left vector of W can hold."""
    diagonal, beside = _lanczos(plain, directions / np.linalg.norm(directions, axis=0))
    points = np.linspace(0.0, (1 + 1e-3) * top**2, _POINTS)
    shares = np.empty(directions.shape[1])
    for place in range(len(shares)):
        alphas, betas = diagonal[:, place], beside[:, place]
        nodes = np.linalg.eigvalsh(
            np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
        )
        shares[place] = _christoffel(
            np.concatenate([points, nodes], dtype=np.float64), alphas, betas
        ).max()
    return np.minimum(shares, 1.0)


def _christoffel(points: Array, alphas: Array, betas: Array) -> Array:
    """Return 1 / Σ p_k(x)², k from 0 to one less than the steps."""
    before, now = np.zeros_like(points), np.ones_like(points)
    total = np.ones_like(points)
    for step in range(len(alphas) - 1):
        last = betas[step - 1] * before if step else 0.0
        before, now = now, ((points - alphas[step]) * now - last) / betas[step]
        total += now**2
    return 1 / total


def _lanczos(plain: Operator, start: Array) -> tuple[Array, Array]:
    """Return the coefficients (steps, k) of Lanczos runs on W · Wᵀ, one from each unit column.

    Every run is orthogonalised in full: their bases are a few columns.
    """
    runs = [start]
    alphas, betas = np.empty((_STEPS, start.shape[1])), np.empty((_STEPS, start.shape[1]))
    for step in range(_STEPS):
        image = plain.times(plain.transposed_times(runs[-1]))
        alphas[step] = np.einsum("ij,ij->j", runs[-1], image)
        for _ in range(2):
            for known in runs:
                image -= known * np.einsum("ij,ij->j", known, image)
        betas[step] = np.linalg.norm(image, axis=0)
        runs.append(image / np.maximum(betas[step], 1e-300))
    return alphas, np.maximum(betas, 1e-300)


def _cosines(plain: Operator, changed: Operator) -> Array:
    """Return max |cos| of each leading left singular vector of W' with all of W's."""
    old = np.linalg.svd(plain.plane.dense(), full_matrices=False)[0]
    new = np.linalg.svd(changed.plane.dense(), full_matrices=False)[0][:, :LEADING]
    return np.asarray(np.abs(new.T @ old).max(axis=1), dtype=np.float64)
