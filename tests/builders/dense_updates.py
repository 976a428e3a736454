"""What an adapter adds to its base, multiplied out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.model import AdapterTensorSet


def dense(adapter: AdapterTensorSet) -> dict[str, np.ndarray]:
    """Return scale · B · A of every module, in float64."""
    return {
        pair.module: pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy().astype(float)
        for pair in adapter.pairs()
    }
