"""Work on several threads that ends together, and how far it is."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# The work is short calls into numpy and the kernel, between which Python holds its lock: more
# threads only wait.
MOST_THREADS = 4


def threads(wished: int | None = None) -> int:
    """Return how many threads to use: as wished, else one for each processor, a few at most."""
    return wished or min(os.cpu_count() or 1, MOST_THREADS)


def in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int | None = None
) -> list[_Result]:
    """Return function of each item, in order, computed by a few threads.

    An error or an interrupt is raised at once: what is running is left to end by itself, and what
    waits is never begun. The function must therefore change nothing that others see.
    """
    if threads(workers) == 1:
        return [function(item) for item in items]
    pool = ThreadPoolExecutor(threads(workers))
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Crew:
    """Threads of which one that fails stops the others, between two tasks.

    As a context manager it ends only when no task is running any more, so that what they write to
    can be closed; an error or interrupt in the block stops them too.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._stopped = threading.Event()
        self._errors: list[BaseException] = []

    def submit(self, task: Callable[[], _Result]) -> Future[_Result]:
        """Have a task done; one that has not begun when all stop is never done."""
        return self._pool.submit(self._done, task)

    def _done(self, task: Callable[[], _Result]) -> _Result:
        if self._stopped.is_set():
            raise StoppedError
        try:
            return task()
        except BaseException as error:
            self._errors.append(error)
            self._stopped.set()
            raise

    def check(self) -> None:
        """Raise the first error of a task, if there is one."""
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for what is running; begin nothing more."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


class StoppedError(Exception):
    """Another task has failed, or all were told to stop."""


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
