"""A few threads over many modules."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# The work is short calls into numpy, between which Python holds its lock: more threads only wait.
_WORKERS = 4


def in_parallel(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Return function of each item, in order, computed by a few threads."""
    workers = min(os.cpu_count() or 1, _WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))
