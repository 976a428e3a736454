"""Updates as products of thin factors: everything is computed on R x R cores, never on B · A.

With B = Q_B R_B and Aᵀ = Q_A R_A, the singular value decomposition of the small core R_B R_Aᵀ is
that of B · A (Eckart and Young 1936 for its truncation). All numbers are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Array: TypeAlias = NDArray[np.float64]

# Singular values below this share of the largest are rounding: float32 factors carry 6e-8 ...
NUMERICAL_ZERO = 1e-7
# ... and float64 factors this.
EXACT_ZERO = 1e-13
# Directions of a factor with unit columns below this share are rounding of float64.
_DEPENDENT = 1e-10
# Ratio of the extreme singular values up to which a Gram matrix keeps 1e-10 of the smallest.
_GRAM_CONDITION = 1e3
# Lengths between this and its inverse have squares that are numbers.
_SMALLEST = 1e-100
# Rows of one block of a tall factor: what a second-level cache holds at rank 32.
_BLOCK_ROWS = 512


@dataclass(frozen=True, slots=True)
class LowRank:
    """One update ΔW = B · A of unit scale.

    Attributes:
        b: (out, r), float64, the scale included.
        a: (r, in), float64.
        scale: the multiplier that `b` includes; only a rule that looks at the factors themselves,
            and so depends on their basis, needs it.
    """

    b: Array
    a: Array
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Inner dimension; 0 for an update that is not there."""
        return self.b.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update."""
        return self.b.shape[0], self.a.shape[1]


def nothing(shape: tuple[int, int]) -> LowRank:
    """Return a zero update of rank 0."""
    return LowRank(np.zeros((shape[0], 0)), np.zeros((0, shape[1])))


def stacked(updates: Sequence[LowRank], coefficients: Sequence[float]) -> LowRank:
    """Return Σ cᵢ ΔWᵢ exactly, with rank Σ rᵢ: B = [c₁B₁ … c_TB_T], A = [A₁; …; A_T]."""
    return LowRank(
        np.concatenate([u.b * c for u, c in zip(updates, coefficients, strict=True)], axis=1),
        np.concatenate([u.a for u in updates], axis=0),
    )


def gram(updates: Sequence[LowRank]) -> Array:
    """Return the (T, T) matrix of inner products ⟨ΔWᵢ, ΔWⱼ⟩ = Σ (BᵢᵀBⱼ) ∘ (AᵢAⱼᵀ)."""
    count = len(updates)
    inner = np.zeros((count, count))
    for i, first in enumerate(updates):
        for j, second in enumerate(updates[: i + 1]):
            inner[i, j] = inner[j, i] = _inner(first, second)
    return inner


def _inner(first: LowRank, second: LowRank) -> float:
    return float(np.sum((first.b.T @ second.b) * (first.a @ second.a.T)))


def norm(update: LowRank) -> float:
    """Return ‖ΔW‖, Frobenius."""
    return max(_inner(update, update), 0.0) ** 0.5


def distance(first: LowRank, second: LowRank) -> float:
    """Return ‖ΔW₁ - ΔW₂‖, Frobenius; accurate to about 1e-8 of the norms."""
    squared = _inner(first, first) + _inner(second, second) - 2 * _inner(first, second)
    return max(squared, 0.0) ** 0.5


def triangle(tall: Array) -> Array:
    """Return R of a QR decomposition of (rows, r), block by block so that it stays in the cache.

    The tree of small decompositions is that of Demmel et al. (2012), "Communication-optimal
    parallel and sequential QR and LU factorizations"; it is as stable as the plain one.
    """
    rows, columns = tall.shape
    height = max(_BLOCK_ROWS, 4 * columns)
    whole = rows // height
    if whole < 2 or not columns:  # noqa: PLR2004  (one block is the plain decomposition)
        return _upper(tall)
    blocks = tall[: whole * height].reshape(whole, height, columns)
    heads = _upper(blocks).reshape(-1, columns)
    return _upper(np.concatenate([heads, tall[whole * height :]]))


def _upper(matrices: Array) -> Array:
    # The stub of `qr` knows only what the mode with Q returns.
    return cast("Any", np.linalg.qr)(matrices, mode="r")


def basis(tall: Array) -> tuple[Array, Array]:
    """Return T (r, k) and R (k, r) with tall · T orthonormal and tall = (tall · T) · R.

    Columns that depend on others add no direction: k is the numerical rank. Each column is brought
    to unit length first, so that no basis of the factors, however lopsided, loses digits. Their
    Gram matrix is enough where they are far from dependent: it is the square, and has half the
    digits, of what a QR decomposition gives.
    """
    squares = tall.T @ tall
    lengths = np.sqrt(np.diagonal(squares))
    if lengths.size and lengths.min() > _SMALLEST and lengths.max() < 1 / _SMALLEST:
        values, vectors = np.linalg.eigh(squares / lengths / lengths[:, None])
        if values[0] * _GRAM_CONDITION**2 > values[-1]:
            return _directions(np.sqrt(values), vectors.T, lengths)
    upper = triangle(tall)
    lengths = np.linalg.norm(upper, axis=0)
    lengths[lengths == 0] = 1.0
    _, values, vectors = np.linalg.svd(upper / lengths, full_matrices=False)
    kept = values > _DEPENDENT * max(values[0], 1.0) if values.size else values > 0
    return _directions(values[kept], vectors[kept], lengths)


def _directions(values: Array, vectors: Array, lengths: Array) -> tuple[Array, Array]:
    return (vectors.T / values) / lengths[:, None], (values[:, None] * vectors) * lengths


@dataclass(frozen=True, slots=True)
class Spectrum:
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
        b = np.zeros((self.update.shape[0], rank))
        a = np.zeros((rank, self.update.shape[1]))
        b[:, :kept] = self.update.b @ (self.left[:, :kept] * root)
        a[:kept] = (root[:, None] * self.right[:kept]) @ self.update.a
        return b, a


def decompose(update: LowRank, zero: float = NUMERICAL_ZERO) -> Spectrum:
    """Return the singular value decomposition of B · A from its R x R core.

    O((out + in) R²) operations and memory for the factors only.

    Args:
        update: the factors.
        zero: share of the largest singular value below which others are left out.
    """
    to_left, left = basis(update.b)
    to_right, right = basis(update.a.T)
    u, values, vt = np.linalg.svd(left @ right.T, full_matrices=False)
    # What cancels leaves rounding of the parts behind, however large it is against the rest.
    parts = np.linalg.norm(update.b, axis=0) * np.linalg.norm(update.a, axis=1)
    cancelled = EXACT_ZERO * parts.max(initial=0.0)
    kept = values > max(cancelled, zero * values.max(initial=0.0))
    return Spectrum(
        update,
        to_left @ u[:, kept],
        values[kept],
        (to_right @ vt[kept].T).T,
        float(np.linalg.norm(values[values > cancelled])),
    )


def balanced(update: LowRank) -> LowRank:
    """Return the same update as U√Σ · √ΣVᵀ: the one basis that every basis of it leads to."""
    spectrum = decompose(update)
    return LowRank(*spectrum.factors(spectrum.values.size))
