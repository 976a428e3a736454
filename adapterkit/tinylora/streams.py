"""The fixed projections, drawn from torch's own generators.

The CPU stream depends on the number of elements (below 16 torch draws one by one, from 16 in
blocks), so every projection is drawn whole, in its exact shape, by torch itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
from typing import TYPE_CHECKING, Any

from adapterkit.errors import UncheckableError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_SEED_SPREAD = 100_000
# A projection is tiny in every real file; more than this is a hostile shape.
_MAX_ELEMENTS = 1 << 28


def available() -> bool:
    """Tell whether torch is installed, without importing it."""
    return importlib.util.find_spec("torch") is not None


def pack_seed(module: str, seed: int) -> int:
    """Return the generator seed that the ANRGUSC pack derives from a module's dotted name."""
    digest = hashlib.sha256(module.encode()).hexdigest()
    return seed + int(digest[:8], 16) % _SEED_SPREAD


def pack_projection(module: str, seed: int, size: int, rank: int) -> Array:
    """Return P of the ANRGUSC pack, float32 (size, rank, rank): standard normal over √rank.

    Raises:
        UncheckableError: if torch is not installed.
    """
    torch = _torch(size, rank)
    generator = torch.Generator(device="cpu").manual_seed(pack_seed(module, seed))
    drawn = torch.randn(size, rank, rank, generator=generator, dtype=torch.float32)
    return (drawn / rank**0.5).numpy()


def peft_projection(index: int, seed: int, size: int, rank: int) -> Array:
    """Return P as PEFT 0.20 and later draw it, float32 (size, rank, rank).

    Args:
        index: place of the module among all targets, in registration order.
        seed: `projection_seed` of the config.
        size: u, the number of coefficients.
        rank: r.

    Raises:
        UncheckableError: if torch is not installed.
    """
    torch = _torch(size, rank)
    generator = torch.Generator(device="cpu").manual_seed(seed + index)
    # Not randn / √rank: the two round differently in the last bit.
    drawn = torch.normal(0.0, 1.0 / rank**0.5, size=(size, rank, rank), generator=generator)
    return drawn.numpy()


def _torch(size: int, rank: int) -> Any:
    if size * rank * rank > _MAX_ELEMENTS:
        raise UnsupportedError(
            f"a projection of {size} x {rank} x {rank} elements is not plausible"
        )
    try:
        import torch
    except ImportError:
        raise UncheckableError(
            "the projections are not in the file and come from torch's random streams; "
            "pip install torch"
        ) from None
    return torch
