"""Many calls over any executor of `concurrent.futures`, of which each may kill its worker."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.errors import UncheckableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Calls that wait in an executor's own queue for each that runs: what is lost when it breaks.
_AHEAD = 4
_MOMENT = 0.5
# One thread each, or the workers' arithmetic fights for the processors.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def carried_out(
    items: Iterable[_Item],
    call: Callable[[_Item], tuple[Any, ...]],
    executor: Callable[[], Executor],
    note: Callable[[list[tuple[_Item, _Result]]], None],
    lost: Callable[[_Item, BaseException], _Result],
    *,
    workers: int,
) -> None:
    """Make a call for each item and note what it returned, in the order in which they end.

    A worker that dies may take with it what others were doing, and nobody knows who was to blame:
    everything that is lost is called again one at a time, and who is lost alone is to blame.

    Args:
        items: one for each call.
        call: returns function and arguments of an item's call; the function must not raise.
        executor: returns one to use, a new one if the last was broken.
        note: takes what has ended, in the caller's own thread.
        lost: returns what to note of an item whose worker died.
        workers: how many calls run side by side.

    Raises:
        UncheckableError: if the executor is broken and stays so.
    """
    waiting, suspects = deque(items), deque[_Item]()
    answered = False
    while waiting or suspects:
        if not suspects:
            known = len(waiting)
            gone = _round(waiting, call, executor, note, workers * _AHEAD)
            answered = answered or known > len(waiting) + len(gone)
            if gone and not answered:
                _check_beginning(executor)
            suspects.extend(item for item, _ in gone)
        else:
            gone = _round(suspects, call, executor, note, 1)
            note([(item, lost(item, error)) for item, error in gone])


def _round(
    queue: deque[_Item],
    call: Callable[[_Item], tuple[Any, ...]],
    executor: Callable[[], Executor],
    note: Callable[[list[tuple[_Item, _Result]]], None],
    most: int,
) -> list[tuple[_Item, BaseException]]:
    """Take from a queue until it is empty or something is lost; return what is."""
    pending: dict[Future[_Result], _Item] = {}
    gone: list[tuple[_Item, BaseException]] = []
    with _ending(executor()) as pool:
        while pending or (queue and not gone):
            while queue and not gone and len(pending) < most:
                try:
                    future = pool.submit(*call(queue[0]))
                except BrokenExecutor as error:
                    if not pending and not gone:
                        message = f"the executor is broken ({error}); run again to go on"
                        raise UncheckableError(message) from error
                    gone.append((queue.popleft(), error))
                else:
                    pending[future] = queue.popleft()
            ended: list[tuple[_Item, _Result]] = []
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                item = pending.pop(future)
                try:
                    ended.append((item, future.result()))
                except Exception as error:  # noqa: BLE001  (executors raise what they like)
                    gone.append((item, error))
            note(ended)
    return gone


def _check_beginning(executor: Callable[[], Executor]) -> None:
    """Raise if no worker can begin, whatever it is asked."""
    with _ending(executor()) as pool:
        try:
            future = pool.submit(os.getpid)
        except BrokenExecutor:  # the caller's own, which cannot be made anew
            return
        try:
            future.result()
        except BrokenExecutor as error:
            message = (
                "no process could begin; in a script, call this under "
                "`if __name__ == '__main__':`, since each process imports the script anew"
            )
            raise UncheckableError(message) from error


@contextmanager
def _ending(pool: Executor) -> Generator[Executor]:
    """Let go of an executor of ours: nothing waits for what an interrupt left running."""
    try:
        yield pool
    finally:
        if isinstance(pool, ProcessPoolExecutor):
            pool.shutdown(wait=False, cancel_futures=True)


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of fresh processes that end with this one, however it ends."""
    # Threads make fork unsafe.
    context = multiprocessing.get_context("spawn")
    for name in _THREADS:
        os.environ.setdefault(name, "1")
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_live_with, initargs=(os.getpid(),)
    )


def _live_with(parent: int) -> None:
    """End this process when its parent has: a worker would wait for ever on a queue.

    Interrupts are for the parent to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_MOMENT)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def dask_executor(address: str) -> Generator[tuple[Executor, int]]:
    """Yield the executor of a Dask cluster and how many threads its workers have.

    Raises:
        UsageError: if Dask is not installed, or nothing answers at the address.
        UncheckableError: if a worker has another version of adapterkit, or none.
    """
    try:
        distributed: Any = import_module("distributed")
    except ImportError:
        raise UsageError("Dask is not installed; pip install 'adapterkit[dask]'") from None
    try:
        client = distributed.Client(address, timeout=10)
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {address} ({error})") from error
    with client:
        versions = client.run(_version)
        if others := {name: v for name, v in versions.items() if v != _version()}:
            worker, version = next(iter(others.items()))
            message = f"has adapterkit {version}, not {_version()}"
            raise UncheckableError(message, where=f"worker {worker}")
        workers = sum(client.nthreads().values())
        # Equal calls are calls of their own: a second try is not the first's result.
        yield client.get_executor(pure=False), max(workers, 1)


def _version() -> str:
    return str(import_module("adapterkit").__version__)
