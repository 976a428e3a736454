"""The frozen SVD of a base weight, and how far two computations of it may be apart.

U and V are unique up to a common sign of each pair, and only as well as neighbouring singular
values are apart. A pair whose sign differs from training turns M into D M D with D = diag(±1): the
update changes by 2 (Σ s_i² M_ij²)^½ over all i, j whose signs differ from each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import FormatError
from adapterkit.tinylora import streams

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.dtype import DType
    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[Any]]

# Two drivers on one matrix: error of the update times the relative gap. In float32 the largest of
# 600 matrices; in float64 that times the ratio of the precisions, with room.
_ERROR_TIMES_GAP = {"float32": 6e-7, "float64": 1e-14}


@dataclass(frozen=True, slots=True)
class Frozen:
    """Leading singular triplets of a weight, float32.

    Attributes:
        u: (out, r).
        s: (r,), descending.
        vt: (r, in).
        after: the singular value that follows; None if r is the full rank.
        driver: library that computed it.
        precision: type it was computed in, `float32` or `float64`.
    """

    u: Array
    s: Array
    vt: Array
    after: float | None
    driver: str
    precision: str

    @property
    def relative_gap(self) -> float:
        """Smallest distance of two neighbouring singular values over the largest value."""
        values = [*map(float, self.s), *([] if self.after is None else [self.after])]
        gaps = [first - second for first, second in pairwise(values)]
        if not gaps:
            return 1.0
        return min(gaps) / values[0] if values[0] else 0.0

    @property
    def predicted_error(self) -> float:
        """Relative error of an update that another driver may cause, signs being equal."""
        gap = self.relative_gap
        return min(2.0, _ERROR_TIMES_GAP[self.precision] / gap) if gap > 0 else 2.0


def frozen_svd(
    weight: LazyTensor, rank: int, rounded: DType | None, precision: str, *, module: str = ""
) -> Frozen:
    """Return the first min(rank, out, in) singular triplets of a weight, as float32.

    Training computes them in float32 with torch, which is the most likely to give its signs again.
    What adapterkit makes is computed in float64: there the driver does not matter.

    Args:
        weight: (out, in), any float type.
        rank: triplets to keep.
        rounded: type to which training rounded the weight first; None if it is the stored one.
        precision: `float32`, by torch where it is installed, or `float64`, by numpy.
        module: whose weight it is, for messages.

    Raises:
        FormatError: if the weight is not finite.
    """
    import numpy as np

    values = (weight.cast(rounded) if rounded else weight).numpy()
    matrix = np.ascontiguousarray(values, dtype=precision)
    if not np.isfinite(matrix).all():
        raise FormatError("its weight in the base holds NaN or infinity", where=module)
    u, s, vt, driver = _factored(matrix)
    kept = min(rank, len(s))
    return Frozen(
        u=np.ascontiguousarray(u[:, :kept], dtype=np.float32),
        s=np.ascontiguousarray(s[:kept], dtype=np.float32),
        vt=np.ascontiguousarray(vt[:kept], dtype=np.float32),
        after=float(s[kept]) if len(s) > kept else None,
        driver=driver,
        precision=precision,
    )


def _factored(matrix: Array) -> tuple[Array, Array, Array, str]:
    """Return U, s, Vᵀ and the library that computed them; float32 is torch's, if it is there."""
    import numpy as np

    if matrix.dtype == np.float32 and streams.available():
        import torch

        # torch's functions are not typed.
        library = cast("Any", torch)
        parts = library.linalg.svd(library.from_numpy(matrix.copy()), full_matrices=False)
        u, s, vt = cast("list[Array]", [part.numpy() for part in parts])
        return u, s, vt, f"torch {torch.__version__}"
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u, s, vt, f"numpy {np.__version__}"


def like(frozen: Frozen, u: Array) -> Frozen:
    """Return the same SVD with every pair turned to agree with another computation's U."""
    import numpy as np

    turn = np.where((frozen.u * u).sum(0) < 0, -1, 1).astype(np.float32)
    return replace(frozen, u=frozen.u * turn, vt=frozen.vt * turn[:, None])


def flip_error(s: Array, core: Array) -> float:
    """Return how far ΔW = U diag(s) M Vᵀ goes if the worst single pair has its other sign.

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
