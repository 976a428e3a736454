"""Methods whose result is a combination Σ aᵢ ΔWᵢ, with coefficients from inner products alone.

Each takes the Gram matrix (T, T) of the updates, the weights (T,) and its parameters, and returns
the coefficients (T,). An update that is not there has zeros in the Gram matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapterkit.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.lowrank.products import Array

    Parameters = Mapping[str, float | None]

# Below this sine two directions span no circle; between them the straight line is as good.
_PARALLEL = 1e-6
_STEPS = 200
_STILL = 1e-14
# A mean this short, against unit vectors, points nowhere: the directions cancel.
_CANCELLED = 1e-9
# Sums this small are taken for 0, as mergekit does.
_NO_TOTAL = 1e-6


def linear(gram: Array, weights: Array, parameters: Parameters) -> Array:
    """The coefficients are the weights: the weighted sum."""
    del gram, parameters
    return weights


def slerp(gram: Array, weights: Array, parameters: Parameters) -> Array:
    """Two updates are met at t = w₂ / (w₁ + w₂) of the angle between them (Shoemake 1985).

    The result is (w₁ + w₂) · (sin((1 - t)θ) ΔW₁ + sin(tθ) ΔW₂) / sin θ: weights that sum to 1 are
    the usual slerp. Parallel and missing updates are added on the straight line.
    """
    del parameters
    strength = float(weights.sum())
    lengths = np.sqrt(np.diag(gram))
    if not lengths.all() or not strength:
        return weights
    return strength * _between(gram / np.outer(lengths, lengths), weights / strength)


def nuslerp(gram: Array, weights: Array, parameters: Parameters) -> Array:
    """mergekit's: slerp at t = w₂ / (w₁ + w₂), whatever w₁ + w₂ is; t = ½ where that is 0.

    A missing update is at a right angle to the other, parallel ones are met on the straight line.
    """
    del parameters
    total = float(weights.sum())
    shares = weights / total if abs(total) >= _NO_TOTAL else np.full(2, 0.5)
    lengths = np.sqrt(np.diag(gram))
    lengths = np.where(lengths > 0, lengths, 1.0)
    return _between(gram / np.outer(lengths, lengths), shares)


def multislerp(gram: Array, weights: Array, parameters: Parameters) -> Array:
    """mergekit's: the direction of the weighted mean of the directions, with the mean norm.

    Its detour through the tangent space at that mean adds nothing: the mean of the tangents is 0.
    Weights are shares. Of two whose directions cancel, the straight line is taken.

    Raises:
        UnsupportedError: if the directions of more than two cancel, or the weights sum to 0.
    """
    del parameters
    total = float(weights.sum())
    if abs(total) < _NO_TOTAL:
        raise UnsupportedError("the weights sum to 0, and multislerp divides by their sum")
    shares = weights / total
    lengths = np.sqrt(np.diag(gram))
    inverse = 1 / np.where(lengths > 0, lengths, 1.0)
    mean = shares * inverse
    length = max(float(mean @ gram @ mean), 0.0) ** 0.5
    if length >= _CANCELLED:
        return mean / length * float(shares @ lengths)
    if weights.size == 2 or not lengths.any():  # noqa: PLR2004  (a pair)
        return shares
    raise UnsupportedError("the weighted directions cancel and have no mean; use other weights")


def _between(cosines: Array, shares: Array) -> Array:
    """Return the slerp coefficients of two vectors at the angle that `cosines` gives."""
    angle = float(np.arccos(np.clip(cosines[0, 1], -1.0, 1.0)))
    if np.sin(angle) < _PARALLEL:
        return shares
    return np.sin(shares * angle) / np.sin(angle)


def karcher(gram: Array, weights: Array, parameters: Parameters) -> Array:
    """The direction is the Riemannian mean of the directions (Karcher 1977), the norm their mean.

    The weighted mean is found by gradient steps on the sphere, in coefficients of the updates: no
    step leaves their span. Directions that cancel have no mean and are summed.
    """
    del parameters
    lengths = np.sqrt(np.diag(gram))
    there = np.flatnonzero(lengths)
    shares = weights[there]
    if not shares.sum():
        return weights
    shares = shares / shares.sum()
    cosines = gram[np.ix_(there, there)] / np.outer(lengths[there], lengths[there])
    mean = shares.copy()
    if float(mean @ cosines @ mean) < _CANCELLED**2:
        return weights
    for _ in range(_STEPS):
        mean, moved = _step(mean, cosines, shares)
        if moved < _STILL:
            break
    coefficients = np.zeros_like(weights)
    coefficients[there] = mean * float(weights @ lengths) / lengths[there]
    return coefficients


def _step(mean: Array, cosines: Array, shares: Array) -> tuple[Array, float]:
    """Move a point of the sphere by the mean of its logarithms to the others."""
    mean = mean / float(mean @ cosines @ mean) ** 0.5
    towards = np.clip(cosines @ mean, -1.0, 1.0)
    angles = np.arccos(towards)
    sines = np.sin(angles)
    # θ / sin θ tends to 1 for the point itself.
    pulls = shares * np.where(sines > _STILL, angles / np.where(sines > _STILL, sines, 1.0), 1.0)
    tangent = pulls - mean * float(pulls @ towards)
    length = max(float(tangent @ cosines @ tangent), 0.0) ** 0.5
    if length < _STILL:
        return mean, length
    return np.cos(length) * mean + np.sin(length) / length * tangent, length


def model_stock(gram: Array, weights: Array, parameters: Parameters) -> Array:
    """The mean is shrunk by T cos θ / ((T - 1) cos θ + 1) (Jang et al. 2024, "Model Stock").

    cos θ is the mean cosine of all pairs, as mergekit has it: of updates that oppose each other the
    result points away from their mean, and where the quotient has no value it is 0. T counts the
    updates that are there: a module that one adapter alone has is kept.
    """
    del parameters
    lengths = np.sqrt(np.diag(gram))
    there = np.flatnonzero(lengths)
    count = there.size
    if count <= 1:
        return weights
    cosines = gram[np.ix_(there, there)] / np.outer(lengths[there], lengths[there])
    cosine = float(cosines.sum() - np.trace(cosines)) / (count * (count - 1))
    below = (count - 1) * cosine + 1
    return weights * (count * cosine / below if abs(below) >= _NO_TOTAL else 0.0)
