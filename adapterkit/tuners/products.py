"""Hadamard and Kronecker products of small factors are one product of larger ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from adapterkit.tensor import LazyTensor
from adapterkit.tuners.factored import Factors, compact, computed, equal, matrices, wide

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

# A matrix, whole or as the two factors of a product.
Matrix: TypeAlias = tuple[LazyTensor] | tuple[LazyTensor, LazyTensor]


def hadamard(w1_a: LazyTensor, w1_b: LazyTensor, w2_a: LazyTensor, w2_b: LazyTensor) -> Factors:
    """Return (W1_a · W1_b) ∘ (W2_a · W2_b) as one product of rank r1 · r2.

    Column i · r2 + j of B is column i of W1_a times column j of W2_a, element by element; rows of A
    likewise (the Khatri-Rao identity). LoHa, FedPara: arXiv 2108.06098.

    Args:
        w1_a: (out, r1).
        w1_b: (r1, in).
        w2_a: (out, r2).
        w2_b: (r2, in).

    Raises:
        ValueError: if the shapes do not fit together.
    """
    matrices(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b)
    equal("ranks of w1", w1_a.shape[1], w1_b.shape[0])
    equal("ranks of w2", w2_a.shape[1], w2_b.shape[0])
    equal("output sizes", w1_a.shape[0], w2_a.shape[0])
    equal("input sizes", w1_b.shape[1], w2_b.shape[1])
    (rows, r1), (r2, columns) = w1_a.shape, w2_b.shape
    rank = r1 * r2

    def a() -> Array:
        return (wide(w1_b)[:, None, :] * wide(w2_b)[None, :, :]).reshape(rank, columns)

    def b() -> Array:
        return (wide(w1_a)[:, :, None] * wide(w2_a)[:, None, :]).reshape(rows, rank)

    def dense() -> Array:
        return (wide(w1_a) @ wide(w1_b)) * (wide(w2_a) @ wide(w2_b))

    return compact(Factors(computed((rank, columns), a), computed((rows, rank), b)), dense)


def kronecker(w1: Matrix, w2: Matrix) -> Factors:
    """Return W1 ⊗ W2 as (L1 ⊗ L2) · (R1 ⊗ R2) with W = L · R.

    A matrix given whole is its own L or R beside a unit matrix, the smaller one. LoKr: arXiv
    2309.14859.

    Args:
        w1: (a, c), whole or as two factors.
        w2: (b, d), likewise; the update is (a · b, c · d).

    Raises:
        ValueError: if the shapes do not fit together.
    """
    sides: list[tuple[int, int, int]] = []
    for name, parts in (("w1", w1), ("w2", w2)):
        matrices(**{f"{name}[{place}]": part for place, part in enumerate(parts)})
        if len(parts) > 1:
            equal(f"ranks of {name}", parts[0].shape[1], parts[1].shape[0])
        rows, columns = parts[0].shape[0], parts[-1].shape[1]
        rank = parts[0].shape[1] if len(parts) > 1 else min(rows, columns)
        sides.append((rows, rank, columns))
    rows, rank, columns = (x * y for x, y in zip(*sides, strict=True))

    def a() -> Array:
        return _product(_halves(w1)[1], _halves(w2)[1])

    def b() -> Array:
        return _product(_halves(w1)[0], _halves(w2)[0])

    def dense() -> Array:
        (left1, right1), (left2, right2) = _halves(w1), _halves(w2)
        return _product(left1 @ right1, left2 @ right2)

    return compact(Factors(computed((rank, columns), a), computed((rows, rank), b)), dense)


def _product(first: Array, second: Array) -> Array:
    import numpy as np

    return np.asarray(np.kron(first, second), dtype=np.float64)


def _halves(parts: Matrix) -> tuple[Array, Array]:
    import numpy as np

    if len(parts) > 1:
        return wide(parts[0]), wide(parts[1])
    whole = wide(parts[0])
    rows, columns = whole.shape
    return (whole, np.eye(columns)) if columns <= rows else (np.eye(rows), whole)
