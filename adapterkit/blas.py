"""BLAS on one thread for each caller, as long as several of our threads call it.

Its own threads are for one large product. For many thin ones at once they wait for each other and
burn the processors: a merge of two adapters takes three times as long with them.
"""

from __future__ import annotations

import _thread
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]


class _Blas:
    """Counts who needs single threads; the first one asks for them, the last gives them back."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._holders = 0
        self._limits: threadpool_limits | None = None

    def hold(self) -> bool:
        """Keep BLAS to one thread in this process, until `let_go`; return whether that is so.

        Nothing is done before numpy is imported: there is no BLAS yet.
        """
        if "numpy" not in sys.modules:
            return False
        from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]

        with self._lock:
            if self._limits is None:
                self._limits = threadpool_limits(1, user_api="blas")
            self._holders += 1
        return True

    def let_go(self) -> None:
        """Give BLAS the threads back that it had, once every holder has let go."""
        with self._lock:
            self._holders -= 1
            if not self._holders and self._limits is not None:
                self._limits.restore_original_limits()
                self._limits = None


BLAS = _Blas()
