"""Do the weights that lie beside the factors hold the update already?

Some libraries add the update to the weight when a model is put in evaluation mode, and a state dict
saved then has the same names and shapes. The factors are the same either way; whoever took the
weights for the base model would apply the update twice. A weight W that was not trained knows
nothing of ΔW, so ⟨W, ΔW⟩ / ‖ΔW‖² is 0 up to its noise, and 1 once ΔW was added.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adapterkit.model import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adapterkit.model import Update
    from adapterkit.tensor import LazyTensor

_MATRICES = {Kind.LINEAR, Kind.EMBEDDING}
# A handful of layers decide; nobody wants a whole model read for a remark.
_MOST_BYTES = 64 << 20
# The share must be this sure before it is believed, and this near to 1.
_NOISE = 0.1
_NEAR = 0.4


def merged(pairs: Iterable[tuple[Update, LazyTensor]]) -> bool:
    """Tell whether weights hold their updates; False where that cannot be told.

    Args:
        pairs: updates and the weight beside each; squares and other shapes are left out, for which
            it is not known which way round they are stored.
    """
    import numpy as np

    along = noise = total = 0.0
    room = _MOST_BYTES
    for pair, weight in pairs:
        size = pair.shape[::-1] if pair.embedding else pair.shape
        turned = weight.shape == size[::-1]
        if pair.kind not in _MATRICES or size[0] == size[1] or not (turned or weight.shape == size):
            continue
        room -= weight.size * 8
        if room < 0:
            break
        a, b = (np.asarray(t.numpy(), dtype=np.float64) for t in (pair.a, pair.b))
        values = np.asarray(weight.numpy(), dtype=np.float64)
        # ⟨W, B A⟩ = ⟨Bᵀ W, A⟩, with W as (out, in): a table lies turned to its factors.
        oriented = values.T if turned != pair.embedding else values
        squared = pair.scale**2 * float(np.sum((b.T @ b) * (a @ a.T)))
        along += pair.scale * float(np.sum((b.T @ oriented) * a))
        noise += squared * float(np.mean(values**2))
        total += squared
    if not total > 0:
        return False
    return math.sqrt(noise) / total < _NOISE and abs(along / total - 1) < _NEAR
