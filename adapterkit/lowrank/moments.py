"""Moments of the entries of B · A from the factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from adapterkit.lowrank.products import Array

# Elements of a block of products.
_BLOCK = 1 << 20


def kurtosis(a: Array, b: Array) -> float | None:
    """Return E(x - μ)⁴ / (E(x - μ)²)² of all entries of B · A; 3 for a normal distribution.

    Where it is cheaper, B · A is not formed: with p(v) the products v_k · v_l of a vector's
    entries, (b · a)² = p(b) · p(a), so every moment is an inner product of small sums.

    Args:
        a: (r, in), finite.
        b: (out, r), finite.

    Returns:
        The kurtosis, of any scale; None if all entries are equal.
    """
    rank, count = a.shape[0], b.shape[0] * a.shape[1]
    size_a, size_b = float(np.abs(a).max()), float(np.abs(b).max())
    if not size_a or not size_b:
        return None
    a, b = a / size_a, b / size_b
    pairs = rank * (rank + 1) // 2
    few = pairs**2 * sum(a.shape[1:] + b.shape[:1]) < count * (rank + 16)
    sums = _by_products(a, b) if few else _by_blocks(a, b)
    mean, second, third, fourth = (each / count for each in sums)
    variance = second - mean**2
    if variance <= 1e-12 * second:  # rounding of two equal numbers
        return None
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    return central / variance**2


def _by_products(a: Array, b: Array) -> tuple[float, float, float, float]:
    """Return Σx, Σx², Σx³ and Σx⁴."""
    first, second = np.triu_indices(len(a))
    weights = np.where(first == second, 1.0, 2.0)
    step = max(1, _BLOCK // len(first))
    sums: list[tuple[Array, Array, Array, Array]] = []
    for vectors in (a, b.T):
        width = vectors.shape[1]
        blocks = [vectors[:, start : start + step] for start in range(0, width, step)]
        products = [(part[first] * part[second], part) for part in blocks]
        sums.append(
            (
                vectors.sum(axis=1),
                np.sum([p.sum(axis=1) for p, _ in products], axis=0),
                np.sum([p @ part.T for p, part in products], axis=0),
                np.sum([p @ p.T for p, _ in products], axis=0),
            )
        )
    left, right = sums
    return (
        float(left[0] @ right[0]),
        float((left[1] * weights) @ right[1]),
        float(np.sum(left[2] * right[2] * weights[:, None])),
        float(np.sum(left[3] * right[3] * np.outer(weights, weights))),
    )


def _by_blocks(a: Array, b: Array) -> tuple[float, float, float, float]:
    step = max(1, _BLOCK // a.shape[1])
    total = np.zeros(4)
    for start in range(0, b.shape[0], step):
        values = b[start : start + step] @ a
        squares = values**2
        total += (
            values.sum(),
            squares.sum(),
            float(np.vdot(squares, values)),
            float(np.vdot(squares, squares)),
        )
    first, second, third, fourth = total.tolist()
    return first, second, third, fourth
