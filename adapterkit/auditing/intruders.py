"""Which leading directions of W' = W + ΔW are not W's: proven where that is cheap, else bounded.

An intruder (arXiv 2410.21228) is a left singular vector u of W' with max |cos| < ½ over all left
singular vectors of W. That needs a whole decomposition, and is done so for small weights. For large
ones a direction is familiar if it is near one of W's leading vectors, and new if no single vector
of W can hold a quarter of it. Of the leading vectors that is known. Of all others it is bounded by
what Lanczos steps from the rest of u know of its distribution over the spectrum of W · Wᵀ: no point
of it can hold more than 1 / Σ p_k(x)², with the orthonormal polynomials of those steps
(Christoffel's function; Akhiezer 1965, section 2.5). No bound from as many steps is smaller, and
where W has several values closer to each other than the steps tell apart, it proves nothing.
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
_POINTS = 64
# Lanczos steps at most, between two looks at what they prove, and after which they go on only where
# that many again may prove something.
_STEPS, _LOOK, _DOUBLED = 40, 2, (10, 20)
# A vector of W is known if its angle to the computed one is below this.
_KNOWN = 0.05
# A node is taken for a single value of W if it has less than this of the last step.
_CONVERGED = 1e-2


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
        room = COSINE - unlike[open_]
        strange[open_] = _strange(plain, new.left[:, :looked][:, open_], old, room)
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


def _strange(plain: Operator, directions: Array, old: Triplets, room: Array) -> Mask:
    """Tell which unit directions (out, k) have less than `room` (k,) as |cos| with all of W's.

    Known vectors hold what is computed, up to their angles. All others are orthogonal to the true
    ones: they see the rest of a direction, and of the known ones no more than those angles.
    """
    angles = _angles(old)
    known = angles < _KNOWN
    left, angles = old.left[:, known], angles[known]
    held = np.abs(left.T @ directions)
    rest = directions - left @ (left.T @ directions)
    size = np.maximum(np.linalg.norm(rest, axis=0), 1e-300)
    near: Mask = (held + angles[:, None]).max(axis=0, initial=0.0) < room
    proven: Mask = np.zeros_like(near)
    open_ = np.flatnonzero(near)
    run = _Lanczos(plain, (rest / size)[:, open_])
    while open_.size and run.steps < _STEPS:
        run.step()
        if run.steps % _LOOK:
            continue
        shares = np.array(
            [_heaviest(*each, float(old.values[0]) ** 2) for each in run.coefficients]
        )
        most = (np.sqrt(shares) * size[open_] + angles @ held[:, open_]) / room[open_]
        proven[open_[most < 1]] = True
        # Twice the steps halve a share at best, where the spectrum has no gaps.
        left = (most >= 1) & (most < (_STEPS / run.steps) ** 0.5)
        if run.steps in _DOUBLED and not (left & (most < 2**0.5)).any():
            break
        open_ = open_[left]
        run.keep(left)
    return proven


def _heaviest(alphas: Array, betas: Array, top: float) -> float:
    """Return the maximum of 1 / Σ p_k(x)², k from 0 to one less than the steps, from 0 to top.

    The p_k(x) are the last column of (T - x)⁻¹, up to a factor, T the matrix of the steps: so taken
    they stay right where a node has converged, as the recurrence does not.
    """
    nodes, vectors = np.linalg.eigh(
        np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    )
    first, last = vectors[0], vectors[-1]
    ends = np.unique(np.clip(np.concatenate([[0.0], nodes, [(1 + 1e-3) * top]]), 0.0, None))
    inside = (1 - np.cos(np.pi * (np.arange(_POINTS) + 0.5) / _POINTS)) / 2
    points = np.setdiff1d(ends[:-1, None] + np.diff(ends)[:, None] * inside, nodes)
    columns = last / (nodes - points[:, None])
    between = np.square(columns @ first) / np.square(columns).sum(axis=1)
    # The peak beside a node, which may be narrower than any distance of points.
    gaps = nodes - nodes[:, None]
    gaps[gaps == 0] = np.inf
    columns = last / gaps
    beside = np.square(columns @ first) / np.maximum(np.square(columns).sum(axis=1), 1e-300)
    return float(max(between.max(), (first**2 + beside)[np.abs(last) < _CONVERGED].max(initial=0)))


class _Lanczos:
    """Lanczos runs on W · Wᵀ, one from each unit column, each orthogonalised in full.

    Attributes:
        steps: how many were made.
    """

    def __init__(self, plain: Operator, start: Array) -> None:
        """Begin at the columns of `start` (out, k)."""
        self.steps = 0
        self._plain, self._runs = plain, [start]
        self._alphas, self._betas = (np.empty((0, start.shape[1])) for _ in range(2))

    @property
    def coefficients(self) -> list[tuple[Array, Array]]:
        """Diagonal and subdiagonal of each run, (steps,)."""
        return list(zip(self._alphas.T, self._betas.T, strict=True))

    def step(self) -> None:
        """Make one step of every run."""
        image = self._plain.times(self._plain.transposed_times(self._runs[-1]))
        self._alphas = np.vstack([self._alphas, np.einsum("ij,ij->j", self._runs[-1], image)])
        for _ in range(2):
            for known in self._runs:
                image -= known * np.einsum("ij,ij->j", known, image)
        norms = np.maximum(np.linalg.norm(image, axis=0), 1e-300)
        self._betas = np.vstack([self._betas, norms])
        self._runs.append(image / norms)
        self.steps += 1

    def keep(self, wanted: Mask) -> None:
        """Go on with some of the runs."""
        if not wanted.all():
            self._runs = [each[:, wanted] for each in self._runs]
            self._alphas, self._betas = self._alphas[:, wanted], self._betas[:, wanted]


def _cosines(plain: Operator, changed: Operator) -> Array:
    """Return max |cos| of each leading left singular vector of W' with all of W's."""
    old = np.linalg.svd(plain.plane.dense(), full_matrices=False)[0]
    new = np.linalg.svd(changed.plane.dense(), full_matrices=False)[0][:, :LEADING]
    return np.asarray(np.abs(new.T @ old).max(axis=1), dtype=np.float64)
