"""The singular value decomposition of an update ΔW = B · A, from its R x R core.

With B = Q_B R_B and Aᵀ = Q_A R_A, the decomposition of the small core R_B R_Aᵀ is that of B · A
(Eckart and Young 1936 for its truncation). R is the Cholesky factor of a Gram matrix where the
columns, brought to unit length, are far from dependent, and else that of a QR decomposition.

Singular values are right to 1e-12 of the largest, however lopsided the factors are. U and V are
orthonormal, and U Σ Vᵀ is the update, to 1e-10, to 1e-13 where neither factor is near dependence.
What cancels leaves 1e-15 of ‖B‖ ‖A‖ in the values, and that over ‖B · A‖ in the vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from adapterkit.lowrank.products import SMALL, Array, LowRank

# Singular values below this share of the largest are rounding: float32 factors carry 6e-8 ...
NUMERICAL_ZERO = 1e-7
# ... and float64 factors this.
EXACT_ZERO = 1e-13
# Directions of a factor with unit columns below this share are rounding of float64.
_DEPENDENT = 1e-10
# Columns shorter than this have no inverse length that is a number: they are no directions.
_VANISHING = 1e-290
# Ratio of the extreme singular values of unit columns from which QR takes over: a Gram matrix is
# the square, and has half the digits, of what it gives.
_GRAM_CONDITION = 1e3
# Rows of one block of a tall factor: what a second-level cache holds at rank 32.
_BLOCK_ROWS = 512


def triangles(update: LowRank) -> tuple[Array, Array]:
    """Return R_B and R_A of `triangle`, by half of its calls where both are well conditioned."""
    b, a = update.b, update.a
    if min(update.shape) > update.rank:
        upper = _gram_triangle(np.stack((_gram(b), _gram(a.T))))
        if upper is not None:
            return upper[0], upper[1]
    return triangle(b), triangle(a.T)


def triangle(tall: Array) -> Array:
    """Return R (min(n, r), r) with RᵀR = XᵀX for X (n, r)."""
    if tall.shape[0] > tall.shape[1]:
        upper = _gram_triangle(_gram(tall))
        if upper is not None:
            return upper
    return orthogonal_triangle(tall)


def _gram(tall: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return tall.T @ tall


def _gram_triangle(gram: Array) -> Array | None:
    """Return R (..., r, r) with RᵀR = XᵀX (..., r, r), or None if an X is ill conditioned.

    Cholesky's errors do not depend on the lengths of the columns, so neither does the condition.
    """
    squares = np.diagonal(gram, axis1=-2, axis2=-1)
    if not squares.size or not (squares.min() > SMALL and squares.max() < 1 / SMALL):
        return None
    lengths = np.sqrt(squares)
    try:
        lower = np.linalg.cholesky(gram / lengths[..., None] / lengths[..., None, :])
    except np.linalg.LinAlgError:
        return None
    values = np.linalg.svd(lower, compute_uv=False)
    if not (values[..., -1] * _GRAM_CONDITION > values[..., 0]).all():
        return None
    upper: Array = np.asarray(lower * lengths[..., None], dtype=np.float64)
    return upper.swapaxes(-1, -2)


def orthogonal_triangle(tall: Array) -> Array:
    """Return R of a QR decomposition of (..., rows, r), block by block so that it stays in cache.

    The tree of small decompositions is that of Demmel et al. (2012), "Communication-optimal
    parallel and sequential QR and LU factorizations"; it is as stable as the plain one.
    """
    *stack, rows, columns = tall.shape
    height = max(_BLOCK_ROWS, 4 * columns)
    whole = rows // height
    if whole <= 1 or not columns:  # one block is the plain decomposition
        return _upper(tall)
    blocks = tall[..., : whole * height, :].reshape(*stack, whole, height, columns)
    heads = _upper(blocks).reshape(*stack, -1, columns)
    return _upper(np.concatenate([heads, tall[..., whole * height :, :]], axis=-2))


def _upper(matrices: Array) -> Array:
    # The stub of `qr` knows only what the mode with Q returns.
    return cast("Any", np.linalg.qr)(matrices, mode="r")


def basis(tall: Array) -> tuple[Array, Array]:
    """Return T (r, k) and R (k, r) with tall · T orthonormal and tall = (tall · T) · R.

    Columns that depend on others add no direction: k is the numerical rank. Each column is brought
    to unit length first, so that no basis of the factors, however lopsided, loses digits.
    """
    upper = _gram_triangle(_gram(tall))
    if upper is not None:
        return np.asarray(np.linalg.inv(upper), dtype=np.float64), upper
    upper = orthogonal_triangle(tall)
    size = _size(upper)
    lengths = np.linalg.norm(upper / size, axis=0) * size
    lengths[lengths < _VANISHING] = 1.0
    _, values, vectors = np.linalg.svd(upper / lengths, full_matrices=False)
    kept = values > _DEPENDENT * max(values[0], 1.0) if values.size else values > 0
    values, vectors = values[kept], vectors[kept]
    return (vectors.T / values) / lengths[:, None], (values[:, None] * vectors) * lengths


def _size(matrix: Array) -> float:
    """Return a power of two near the largest entry; one half for a zero matrix."""
    return math.ldexp(1.0, math.frexp(float(np.abs(matrix).max(initial=0.0)))[1] - 1)


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The singular value decomposition of an update, its vectors spelled in the update's factors.

    Attributes:
        update: the update, (out, in) of rank R.
        left: (R, k); U = B · left.
        values: (k,), descending; those that are rounding are left out.
        right: (k, R); Vᵀ = right · A.
        norm: ‖ΔW‖, Frobenius, of the whole update.
    """

    update: LowRank
    left: Array
    values: Array
    right: Array
    norm: float

    @property
    def vectors(self) -> tuple[Array, Array]:
        """U (out, k) and Vᵀ (k, in)."""
        return self.update.b @ self.left, self.right @ self.update.a

    def factors(self, rank: int, scale: float = 1.0) -> tuple[Array, Array]:
        """Return balanced B (out, rank) and A (rank, in): scale · B · A is the best of its rank.

        Args:
            rank: inner dimension of the result; zeros fill what the update does not have.
            scale: what the product will be multiplied with, positive.
        """
        kept = min(rank, self.values.size)
        root = np.sqrt(self.values[:kept] / scale)
        b = self.update.b @ (self.left[:, :kept] * root)
        a = (root[:, None] * self.right[:kept]) @ self.update.a
        if kept < rank:
            b = np.pad(b, ((0, 0), (0, rank - kept)))
            a = np.pad(a, ((0, rank - kept), (0, 0)))
        return b, a


def decompose(update: LowRank, zero: float = NUMERICAL_ZERO) -> Decomposition:
    """Return the singular value decomposition of B · A from its R x R core.

    O((out + in) R²) operations and memory for the factors only.

    Args:
        update: the factors.
        zero: share of the largest singular value below which others are left out.
    """
    to_left, left = basis(update.b)
    to_right, right = basis(update.a.T)
    left_size, right_size = _size(left), _size(right)
    left, right, size = left / left_size, right / right_size, left_size * right_size
    u, values, vt = np.linalg.svd(left @ right.T, full_matrices=False)
    # What cancels leaves rounding of the parts behind, however large it is against the rest.
    parts = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=0)
    cancelled = EXACT_ZERO * parts.max(initial=0.0)
    kept = values > max(cancelled, zero * values.max(initial=0.0))
    return Decomposition(
        update,
        to_left @ u[:, kept],
        values[kept] * size,
        (to_right @ vt[kept].T).T,
        float(np.linalg.norm(values[values > cancelled])) * size,
    )


def balanced(update: LowRank) -> LowRank:
    """Return the same update as U√Σ · √ΣVᵀ: the one basis that every basis of it leads to."""
    found = decompose(update)
    return LowRank(*found.factors(found.values.size))
