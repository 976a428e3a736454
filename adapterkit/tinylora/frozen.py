"""The frozen SVD of a base weight, and how far two computations of it may be apart.

U and V are unique up to a common sign of each pair, and only as well as neighbouring singular
values are apart. A pair whose sign differs from training turns M into D M D with D = diag(±1): the
update changes by 2 (Σ s_i² M_ij²)^½ over all i, j whose signs differ from each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.tinylora import streams

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.dtype import DType
    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[Any]]

# Two float32 drivers on one matrix: error of the update times the relative gap, measured over 600
# matrices (largest seen).
_ERROR_TIMES_GAP = 6e-7


@dataclass(frozen=True, slots=True)
class Frozen:
    """Leading singular triplets of a weight, float32.

    Attributes:
        u: (out, r).
        s: (r,), descending.
        vt: (r, in).
        after: the singular value that follows; None if r is the full rank.
        driver: library that computed it.
    """

    u: Array
    s: Array
    vt: Array
    after: float | None
    driver: str

    @property
    def relative_gap(self) -> float:
        """Smallest distance of two neighbouring singular values over the largest value."""
        values = [*map(float, self.s), *([] if self.after is None else [self.after])]
        gaps = [first - second for first, second in zip(values, values[1:], strict=False)]
        if not gaps:
            return 1.0
        return min(gaps) / values[0] if values[0] else 0.0

    @property
    def predicted_error(self) -> float:
        """Relative error that another driver may cause in an update, signs being equal; at most 2."""
        gap = self.relative_gap
        return min(2.0, _ERROR_TIMES_GAP / gap) if gap > 0 else 2.0


def frozen_svd(weight: LazyTensor, rank: int, rounded: DType | None, *, numpy: bool) -> Frozen:
    """Return the first min(rank, out, in) singular triplets of a weight, computed in float32.

    Args:
        weight: (out, in), any float type.
        rank: triplets to keep.
        rounded: type to which training rounded the weight first; None if it is the stored one.
        numpy: use numpy whatever is installed. torch is what training used, and the most likely to
            give its signs again; with a witness the signs are known and any driver will do.
    """
    import numpy as np

    values = (weight.cast(rounded) if rounded else weight).numpy()
    matrix = np.ascontiguousarray(values, dtype=np.float32)
    if numpy or not streams.available():
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        driver = f"numpy {np.__version__}"
    else:
        import torch

        parts: Any = torch.linalg.svd(torch.from_numpy(matrix.copy()), full_matrices=False)
        u, s, vt = (part.numpy() for part in parts)
        driver = f"torch {torch.__version__}"
    kept = min(rank, len(s))
    after = float(s[kept]) if len(s) > kept else None
    return Frozen(
        np.ascontiguousarray(u[:, :kept]),
        np.ascontiguousarray(s[:kept]),
        np.ascontiguousarray(vt[:kept]),
        after,
        driver,
    )


def flip_error(s: Array, core: Array) -> float:
    """Return the relative change of ΔW = U diag(s) M Vᵀ if the worst single pair had its other sign.

    Args:
        s: singular values (r,).
        core: M, (r, r).
    """
    import numpy as np

    energy = (s[:, None] * core) ** 2
    total = float(energy.sum())
    if total == 0 or len(s) == 1:
        return 0.0
    turned = energy.sum(0) + energy.sum(1) - 2 * np.diag(energy)
    return 2 * float(turned.max() / total) ** 0.5
