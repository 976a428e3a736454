"""How far a merge is, counted by several threads."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def counter(total: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """Return a function that adds up bytes of several threads and tells the sum."""
    lock = threading.Lock()
    done = 0

    def count(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            if progress is not None:
                progress(done, total)

    return count
