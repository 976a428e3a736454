"""The algebra of ΔW = scale · B · A on its factors; B · A is never formed.

All numbers are float64. With G_B = BᵀB and G_A = AAᵀ (both r x r), ‖BA‖² = tr(G_B G_A), and an
inner product is ⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.model import Update
    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[np.float64]]


_BF16_EXPONENT = 0x7F80
# Elements that are looked at at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one update is from another.

    Attributes:
        relative_error: ‖ΔW₂ - ΔW₁‖ / ‖ΔW₁‖, Frobenius; 0 for two zero updates, inf if only the
            first is zero, nan if a factor is not finite.
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); None if one is zero.
        norm_ratio: ‖ΔW₂‖ / ‖ΔW₁‖; None if the first is zero.
    """

    relative_error: float
    cosine: float | None
    norm_ratio: float | None


def same_bits(first: LazyTensor, second: LazyTensor) -> bool:
    """Tell whether two tensors are stored alike, to the bit."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return bytes(first.tobytes()) == bytes(second.tobytes())


def difference(first: Update, second: Update) -> Difference:
    """Compare two updates of one module.

    Equal bits and equal scales are equal updates and need no arithmetic. Factors of one shape are
    compared as (B₂ - B₁) A₁ + B₂ (A₂ - A₁), which loses nothing to cancellation when they are
    close; others by inner products, accurate to about 1e-8.

    Args:
        first: the reference.
        second: the other; must be of the same kind and shape, ranks may differ.

    Raises:
        ValueError: if the updates are of different kinds or shapes.
    """
    if (first.kind, first.shape) != (second.kind, second.shape):
        shown = (f"{update.kind} {list(update.shape)}" for update in (first, second))
        raise ValueError(f"{' and '.join(shown)} cannot be compared")
    if (
        first.scale
        and same_bits(first.a, second.a)
        and same_bits(first.b, second.b)
        and finite(first)
    ):
        ratio = second.scale / first.scale
        return Difference(abs(ratio - 1), math.copysign(1, ratio) if ratio else None, abs(ratio))
    a1, b1 = _factors(first)
    a2, b2 = _factors(second)
    norm1, norm2 = _inner(a1, b1, a1, b1) ** 0.5, _inner(a2, b2, a2, b2) ** 0.5
    cross = _inner(a1, b1, a2, b2)
    apart = _distance(a1, b1, a2, b2, (norm1, norm2, cross))
    return Difference(
        relative_error=_over(apart, norm1),
        cosine=cross / (norm1 * norm2) if norm1 and norm2 else None,
        norm_ratio=norm2 / norm1 if norm1 else None,
    )


def finite(pair: Update) -> bool:
    """Tell whether neither factor holds NaN or infinity."""
    return all_finite(pair.a) and all_finite(pair.b)


def all_finite(tensor: LazyTensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity; it is read in blocks."""
    return all(_finite(block) for block in tensor.blocks(_BLOCK))


def _finite(tensor: LazyTensor) -> bool:
    import numpy as np

    values = tensor.numpy()
    if tensor.dtype is DType.BF16:
        # ml_dtypes has no fast isfinite: an exponent of all ones is NaN or infinity.
        exponents = values.view(np.uint16) & _BF16_EXPONENT
        return not bool((exponents == _BF16_EXPONENT).any())
    wide = values if values.dtype.kind == "f" else values.astype(np.float32)
    return bool(np.isfinite(wide).all())


def norm(pair: Update) -> float:
    """Return ‖ΔW‖, Frobenius, scale included."""
    a, b = _factors(pair)
    return _inner(a, b, a, b) ** 0.5


def _factors(pair: Update) -> tuple[Array, Array]:
    """Return (E, r, in) and (E, out, r) in float64, the scale in B; E is 1 without experts."""
    b, a = pair.stacked()
    return a, b * pair.scale


def _inner(a1: Array, b1: Array, a2: Array, b2: Array) -> float:
    import numpy as np

    # NaN and infinity in a broken adapter come out as NaN, which the callers name.
    with np.errstate(all="ignore"):
        left = b1.swapaxes(-1, -2) @ b2
        right = a1 @ a2.swapaxes(-1, -2)
        value = float(np.sum(left * right))
    # Rounding may push a vanishing squared norm below zero.
    return max(value, 0.0) if a1 is a2 and b1 is b2 else value


def _distance(
    a1: Array, b1: Array, a2: Array, b2: Array, known: tuple[float, float, float]
) -> float:
    import numpy as np

    if a1.shape != a2.shape:
        norm1, norm2, cross = known
        return max(norm1**2 + norm2**2 - 2 * cross, 0.0) ** 0.5
    with np.errstate(all="ignore"):
        b = np.concatenate([b2 - b1, b2], axis=-1)
        a = np.concatenate([a1, a2 - a1], axis=-2)
    return _inner(a, b, a, b) ** 0.5


def _over(apart: float, reference: float) -> float:
    if reference:
        return apart / reference
    return 0.0 if apart == 0 else float("nan") if apart != apart else float("inf")  # noqa: PLR0124
