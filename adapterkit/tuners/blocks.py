"""Low-rank updates that are put together from blocks, or from reflections of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.tuners.factored import Factors, compact, computed, equal, matrices, wide

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[np.float64]]

_STACK = 3


def granular(
    a: LazyTensor, b: LazyTensor, general: tuple[LazyTensor, LazyTensor] | None = None
) -> Factors:
    """Return a grid of k x k blocks, each of rank r / k, as one product of rank k · r.

    The block of outputs o and inputs n is B[o, nth rows] ᵀ · A[n, oth columns] ᵀ. GraLoRA: arXiv
    2505.20355.

    Args:
        a: (k, in / k, r).
        b: (k, r, out / k).
        general: A (h, in) and B (out, h) of a plain LoRA beside the grid, if there is one.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    for name, tensor in (("gralora_A", a), ("gralora_B", b)):
        if len(tensor.shape) != _STACK:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not three axes")
    (count, width, rank), (_, _, height) = a.shape, b.shape
    equal("blocks", count, b.shape[0])
    equal("ranks", rank, b.shape[1])
    if rank % count:
        raise ValueError(f"rank {rank} is no multiple of the {count} blocks")
    rows, columns, inner, share = height * count, width * count, count * rank, rank // count
    sides = ((), ())
    if general is not None:
        matrices(gralora_A_general=general[0], gralora_B_general=general[1])
        equal("general ranks", general[0].shape[0], general[1].shape[1])
        equal("input sizes", columns, general[0].shape[1])
        equal("output sizes", rows, general[1].shape[0])
        sides = ((general[0],), (general[1],))

    def values_a() -> Array:
        import numpy as np

        spread = np.zeros((count, count, share, count, width))
        parts = wide(a).reshape(count, width, count, share)
        for n in range(count):
            spread[:, n, :, n] = parts[n].transpose(1, 2, 0)
        grid = spread.reshape(inner, columns)
        return np.concatenate([grid, *map(wide, sides[0])])

    def values_b() -> Array:
        import numpy as np

        spread = np.zeros((count, height, count, rank))
        parts = wide(b)
        for o in range(count):
            spread[o, :, o] = parts[o].T
        grid = spread.reshape(rows, inner)
        return np.concatenate([grid, *map(wide, sides[1])], axis=1)

    whole = inner + (general[0].shape[0] if general else 0)
    factors = Factors(computed((whole, columns), values_a), computed((rows, whole), values_b))
    return compact(factors, lambda: values_b() @ values_a())


def householder(u: LazyTensor, weight: LazyTensor, *, orthogonal: bool) -> Factors:
    """Return W · H - W of a product of reflections H = Π (I - 2 uᵢ uᵢᵀ / ‖uᵢ‖²).

    H = I - U · T · Uᵀ with a triangular T (Schreiber and Van Loan 1989), so the update has the
    factors -W · U · T and Uᵀ. HRA: arXiv 2405.17484.

    Args:
        u: (in, r).
        weight: W, (out, in).
        orthogonal: whether the vectors are made orthogonal first (apply_GS).

    Raises:
        ValueError: if the shapes do not fit together.
    """
    matrices(hra_u=u, weight=weight)
    equal("input sizes", u.shape[0], weight.shape[1])
    rank = u.shape[1]

    def vectors() -> Array:
        import numpy as np

        found = wide(u)
        return np.linalg.qr(found)[0] if orthogonal else found / np.linalg.norm(found, axis=0)

    def values_b() -> Array:
        import numpy as np

        found = vectors()
        inner = np.zeros((rank, rank))
        for i in range(rank):
            inner[:i, i] = -2 * inner[:i, :i] @ (found[:, :i].T @ found[:, i])
            inner[i, i] = 2
        return -(wide(weight) @ found) @ inner

    return Factors(
        computed((rank, u.shape[0]), lambda: vectors().T),
        computed((weight.shape[0], rank), values_b),
    )
