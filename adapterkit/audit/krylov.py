"""The leading singular triplets of a linear map, with proof of how exact they are.

Block Golub-Kahan-Lanczos with full reorthogonalisation: Rayleigh-Ritz in the span of Ω, MᵀM·Ω,
(MᵀM)²·Ω, ... (Golub and Kahan 1965; block Krylov bounds: Musco and Musco 2015). A block of vectors
makes one pass over the weight worth many; a full decomposition is never needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.audit.spectrum import Array

if TYPE_CHECKING:
    from adapterkit.audit.operators import Operator

# Vectors beyond those asked for, so that the last of them converges as fast as the first.
_EXTRA = 6
_STEPS = 12
# A smaller side of up to this is decomposed as a whole, which is as fast.
_WHOLE = 128
_SEED = 20_261


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
    block = _orthonormal(random.standard_normal((operator.shape[1], count + _EXTRA)))
    basis, images, returns = block[:, :0], np.zeros((operator.shape[0], 0)), block[:, :0]
    found: Triplets | None = None
    for step in range(_STEPS):
        image = operator.times(block)
        back = operator.transposed_times(image)
        basis = np.concatenate([basis, block], axis=1)
        images = np.concatenate([images, image], axis=1)
        returns = np.concatenate([returns, back], axis=1)
        found = _ritz(basis, images, returns, count)
        if step and float(found.residuals.max()) <= tolerance:
            break
        width = min(block.shape[1], smaller - basis.shape[1])
        if not width:
            break
        block = _beyond(back[:, :width], basis)
    assert found is not None  # noqa: S101  (the loop ran)
    return found


def _whole(operator: Operator, count: int) -> Triplets:
    left, values, right = np.linalg.svd(operator.dense(), full_matrices=False)
    zero = np.zeros(count)
    return Triplets(values[:count], left[:, :count], right[:count].T, zero)


def _ritz(basis: Array, images: Array, returns: Array, count: int) -> Triplets:
    """Return the triplets that MᵀM has within the basis."""
    squares, vectors = np.linalg.eigh(images.T @ images)
    values = np.sqrt(np.maximum(squares[::-1][:count], 0.0))
    chosen = vectors[:, ::-1][:, :count]
    scale = np.where(values > 0, values, 1.0)
    left, right = images @ chosen / scale, basis @ chosen
    apart = returns @ chosen / scale - right * values
    top = float(values[0]) or 1.0
    return Triplets(values, left, right, np.linalg.norm(apart, axis=0) / top)


def _beyond(block: Array, basis: Array) -> Array:
    """Return what a block adds to a basis; twice is enough (Parlett 1980)."""
    for _ in range(2):
        block = _orthonormal(block - basis @ (basis.T @ block))
    return block


def _orthonormal(block: Array) -> Array:
    return np.asarray(np.linalg.qr(block)[0], dtype=np.float64)
