"""How far two stored updates of one module are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.dtype import DType
from adapterkit.errors import UncheckableError
from adapterkit.tensor import same_bits

if TYPE_CHECKING:
    from adapterkit.model import Update
    from adapterkit.tensor import LazyTensor

# Exponents of all ones are NaN or infinity: quicker to look for than numpy's isfinite.
_EXPONENTS = {DType.BF16: 0x7F80, DType.F16: 0x7C00}
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


def difference(first: Update, second: Update) -> Difference:
    """Compare two updates of one module.

    Equal numbers and equal scales are equal updates and need no arithmetic, such as bfloat16 and
    the float32 that it was widened to. All else is compared as `distances.distance` does it, which
    loses nothing to cancellation.

    Args:
        first: the reference.
        second: the other; must be of the same kind and shape, ranks may differ.

    Raises:
        ValueError: if the updates are of different kinds or shapes.
        UncheckableError: if they differ, and float64 has no room for one of them.
    """
    if (first.kind, first.shape) != (second.kind, second.shape):
        shown = (f"{update.kind} {list(update.shape)}" for update in (first, second))
        raise ValueError(f"{' and '.join(shown)} cannot be compared")
    if (
        first.scale
        and _same_numbers(first.a, second.a)
        and _same_numbers(first.b, second.b)
        and finite(first)
        and (first.scale == second.scale or not silent(first))
    ):
        ratio = second.scale / first.scale
        return Difference(abs(ratio - 1), math.copysign(1, ratio) if ratio else None, abs(ratio))
    if (
        same_bits(first.a, second.a)
        and finite(first)
        and all_finite(second.b)
        and _same_at_scale(first, second)
    ):
        return Difference(0.0, 1.0, 1.0)
    from adapterkit.lowrank import distances, products

    found = distances.measured(products.whole(first), products.whole(second))
    one, other = found.norms
    return Difference(
        relative_error=_over(found.distance, one),
        cosine=found.inner / one / other if one and other else None,
        norm_ratio=other / one if one else None,
    )


def _same_numbers(first: LazyTensor, second: LazyTensor) -> bool:
    """Tell whether two tensors hold the same numbers, as far as their bits tell."""
    import numpy as np

    if first.shape != second.shape:
        return False
    narrow, wide = (first, second) if first.dtype is DType.BF16 else (second, first)
    if (narrow.dtype, wide.dtype) != (DType.BF16, DType.F32):
        return same_bits(first, second)
    # bf16 is the upper half of float32.
    upper = np.frombuffer(narrow.tobytes(), "<u2").astype("<u4")
    upper <<= 16
    return bool(np.array_equal(upper, np.frombuffer(wide.tobytes(), "<u4")))


def _same_at_scale(first: Update, second: Update) -> bool:
    """Tell whether scale · B is the same number for number: a scale was folded, and none rounded.

    Zero updates are left to arithmetic, which knows that they have no direction.
    """
    import numpy as np

    if not first.scale or not second.scale or first.b.shape != second.b.shape:
        return False
    with np.errstate(over="ignore"):
        one, other = (pair.b.numpy().astype(np.float64) * pair.scale for pair in (first, second))
    same = np.array_equal(one, other) and bool(np.isfinite(one).all())  # two overflows are not one
    return same and bool(one.any()) and bool(first.a.numpy().any())


def finite(pair: Update) -> bool:
    """Tell whether neither factor holds NaN or infinity."""
    return all_finite(pair.a) and all_finite(pair.b)


def all_finite(tensor: LazyTensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity; it is read in blocks."""
    return all(_finite(block) for block in tensor.blocks(_BLOCK))


def _finite(tensor: LazyTensor) -> bool:
    import numpy as np

    values = tensor.numpy()
    if (ones := _EXPONENTS.get(tensor.dtype)) is not None:
        return not bool(((values.view(np.uint16) & ones) == ones).any())
    wide = values if values.dtype.kind == "f" else values.astype(np.float32)
    return bool(np.isfinite(wide).all())


def norm(pair: Update) -> float:
    """Return ‖ΔW‖, Frobenius, scale included.

    Raises:
        UncheckableError: if float64 has no room for it.
    """
    from adapterkit.lowrank import distances, products

    return distances.norm(products.whole(pair))


def silent(pair: Update) -> bool:
    """Tell whether an update is zero; one that float64 has no room for is not."""
    try:
        return norm(pair) == 0
    except UncheckableError:
        return False


def _over(apart: float, reference: float) -> float:
    if reference:
        return apart / reference
    return 0.0 if apart == 0 else math.nan if math.isnan(apart) else math.inf
