"""What libraries under numpy do with memory and processors; to be settled before numpy is there."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

# What takes and gives back factors of a few megabytes thousands of times.
_THIN = {"compress", "convert", "diff", "merge", "verify"}
# Parameters of glibc's mallopt, and bytes: what is smaller comes from memory that is kept, and so
# much of it is kept when it is free.
_TRIM_THRESHOLD, _KEPT = -1, 1 << 25
_MMAP_THRESHOLD, _SMALL = -3, 1 << 24

# Binary logarithm of the cycles that an idle thread of OpenBLAS looks for work before it sleeps. By
# default they are so many that a small command burns a second processor from its start to its end.
_IDLE = 18


def settle_threads() -> None:
    """Let threads that have nothing to do sleep soon, unless the user said otherwise."""
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", str(_IDLE))


def settle_memory(command: str | None) -> None:
    """Keep some megabytes of free memory for the next matrix, where the system's library can.

    The kernel clears every page that it hands out, which takes longer than the sums on it.
    """
    if command not in _THIN or sys.platform != "linux":
        return
    import ctypes

    with suppress(OSError, AttributeError):  # another library than glibc
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _SMALL)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)
