"""Low-rank updates whose factors carry extra scales: per direction, per row, per column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.tuners.factored import Factors, computed, equal, matrices, wide

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[np.float64]]

# PEFT's DeLoRA never divides by a norm below this (DeloraLinear._compute_delta).
_SMALLEST_NORM = 1e-4


def adalora(a: LazyTensor, b: LazyTensor, e: LazyTensor) -> Factors:
    """Return B · diag(e) · A with the singular values in A. AdaLoRA: arXiv 2303.10512.

    Args:
        a: (r, in), right singular vectors.
        b: (out, r), left ones.
        e: (r, 1), singular values.

    Raises:
        ValueError: if the ranks disagree.
    """
    matrices(lora_A=a, lora_B=b, lora_E=e)
    equal("ranks", a.shape[0], b.shape[1], e.shape[0])
    equal("width of lora_E and 1", e.shape[1], 1)
    return Factors(computed(a.shape, lambda: wide(a) * wide(e)), b)


def delora(a: LazyTensor, b: LazyTensor, strength: LazyTensor, columns: LazyTensor) -> Factors:
    """Return B · diag(λ / (r ‖a_i‖ ‖b_i‖)) · A · diag(w). DeLoRA: arXiv 2503.18225.

    Norms are taken as at least 1e-4, as PEFT does.

    Args:
        a: (r, in).
        b: (out, r).
        strength: λ, one number.
        columns: w, (in,), norms of the base's columns.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    matrices(delora_A=a, delora_B=b)
    equal("ranks", a.shape[0], b.shape[1])
    equal("input sizes", a.shape[1], columns.size)
    equal("size of delora_lambda and 1", strength.size, 1)

    def scaled_a() -> Array:
        return wide(a) * wide(columns).reshape(1, -1)

    def scaled_b() -> Array:
        import numpy as np

        left, right = wide(b), wide(a)
        norms = np.maximum(np.linalg.norm(right, axis=1), _SMALLEST_NORM)
        norms *= np.maximum(np.linalg.norm(left, axis=0), _SMALLEST_NORM)
        return left * (float(wide(strength).reshape(())) / (len(right) * norms))

    return Factors(computed(a.shape, scaled_a), computed(b.shape, scaled_b))


def vera(
    a: LazyTensor, b: LazyTensor, rows: LazyTensor, directions: LazyTensor, inputs: int
) -> Factors:
    """Return diag(λ_b) · B[:out] · diag(λ_d) · A[:, :in]. VeRA: arXiv 2310.11454.

    Args:
        a: (r, widest input), shared by all modules.
        b: (widest output, r), shared by all modules.
        rows: λ_b, (out,).
        directions: λ_d, (r,).
        inputs: input size of the module, which the file does not state.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    matrices(vera_A=a, vera_B=b)
    equal("ranks", a.shape[0], b.shape[1], directions.size)
    outputs = rows.size
    if inputs > a.shape[1] or outputs > b.shape[0]:
        raise ValueError(
            f"a module of {outputs} x {inputs} does not fit into the shared projections of "
            f"{b.shape[0]} x {a.shape[1]}"
        )

    def scaled_a() -> Array:
        return wide(a)[:, :inputs] * wide(directions).reshape(-1, 1)

    def scaled_b() -> Array:
        return wide(b)[:outputs] * wide(rows).reshape(-1, 1)

    rank = a.shape[0]
    return Factors(computed((rank, inputs), scaled_a), computed((outputs, rank), scaled_b))
