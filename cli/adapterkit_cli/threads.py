"""How many threads numpy may use; to be settled before numpy is imported."""

from __future__ import annotations

import os

# What runs models in torch, or decomposes whole weights one after another.
_WIDE = {"doctor", "tinylora"}


def settle_blas(command: str | None) -> None:
    """Keep BLAS to one thread where a command's matrices are thin, unless the user said otherwise.

    Several modules at once are faster than several threads for each, which on a busy machine mostly
    wait for each other and burn its processors.
    """
    if command in _WIDE:
        return
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
