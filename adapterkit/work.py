"""Work on several threads that ends together, and how far it is."""

from __future__ import annotations

import _thread
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, cast

from adapterkit.blas import BLAS

if TYPE_CHECKING:
    from types import TracebackType

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")

# The work is short calls into numpy and the kernel, between which Python holds its lock: more
# threads only wait.
MOST_THREADS = 4
# Seconds between two looks whether a task has ended.
_MOMENT = 0.002
# Seconds after which who waits looks again: systems differ in what wakes them.
_LOOK = 1.0


# Who is told how far the work is that goes on in this thread: done, and of how much.
_WATCHER: ContextVar[Callable[[int, int], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(progress: Callable[[int, int], None] | None) -> Generator[None]:
    """Have what goes on in the block tell how far it is: steps done, and of how many.

    A command is several stages, each with a number of its own; a smaller one begins the next.
    """
    token = _WATCHER.set(progress)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def watchable(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Have a function's `progress` told what is tracked in it; None leaves who watches already."""

    @wraps(function)
    def told(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        if named.get("progress") is None:
            return function(*arguments, **named)
        with watched(cast("Callable[[int, int], None]", named["progress"])):
            return function(*arguments, **named)

    return told


def tracked(items: Collection[_Item]) -> Iterator[_Item]:
    """Yield the items of one stage, and tell who watches how many are done."""
    watcher = _WATCHER.get()
    for place, item in enumerate(items):
        if watcher is not None:
            watcher(place, len(items))
        yield item
    if watcher is not None:
        watcher(len(items), len(items))


def threads(wished: int | None = None) -> int:
    """Return how many threads to use: as wished, else one for each processor, a few at most."""
    return wished or min(os.cpu_count() or 1, MOST_THREADS)


def in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int | None = None
) -> list[_Result]:
    """Return function of each item, in order, computed by a few threads.

    Of several errors it is always that of the first item, as if one thread had done all. An
    interrupt is raised at once: what is running is left to end by itself, and what waits is never
    begun. The function must therefore change nothing that others see.
    """
    if threads(workers) == 1:
        return [function(item) for item in tracked(list(items))]
    crew = Crew(threads(workers))
    try:
        tasks = [crew.submit(function, item) for item in items]
        for task in tracked(tasks):
            crew.wait([task])
        return [task.value for task in tasks]
    finally:
        crew.dismiss()


def begin_thread(function: Callable[[], None]) -> None:
    """Begin a thread of the interpreter's own, which debuggers follow as those of `threading`."""

    def followed() -> None:
        sys.settrace(threading.gettrace())
        function()

    _thread.start_new_thread(followed, ())


class Task(Generic[_Result]):
    """A call that a thread makes.

    Attributes:
        number: of the calls given before it.
        done: whether it has returned or raised.
        value: what it returned.
        error: what it raised.
    """

    def __init__(self, call: Callable[[], _Result], number: int = 0) -> None:
        self.call = call
        self.number = number
        self.done = False
        self.value: _Result
        self.error: BaseException | None = None

    def run(self) -> None:
        """Make the call."""
        try:
            self.value = self.call()
        except BaseException as error:  # noqa: BLE001  (raised by who waits)
            self.error = error
        self.done = True

    def result(self) -> _Result:
        """Return what the call returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.value


class Crew:
    """Threads of which one that fails stops the others, between two tasks.

    As a context manager it ends only when no task is running any more, so that what they write to
    can be closed; an error or interrupt in the block stops them too.

    A signal may raise in the main thread between any two steps of Python, also inside a lock that
    is written in Python (a future's, an event's): it would be held for ever, and who waits for it
    would hang. What the main thread shares with the others is therefore made of single steps: a
    plain lock, and queues and threads of the interpreter itself.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._begun = self._given = 0
        self._thin = workers > 1 and BLAS.hold()
        self._tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()
        self._ends: SimpleQueue[None] = SimpleQueue()
        self._lock = _thread.allocate_lock()
        # What is begun when a task fails are those before it: they end, and the first error counts.
        self._last = math.inf
        self._open: set[int] = set()
        self._running: set[Task[Any]] = set()
        self._errors: dict[int, BaseException] = {}

    def submit(self, function: Callable[..., _Result], *arguments: Any) -> Task[_Result]:
        """Have a call made; one that has not begun when all stop is never made."""
        task = Task(lambda: function(*arguments), self._given)
        self._given += 1
        self._open.add(task.number)
        self._tasks.put(task)
        if self._begun < self._workers:
            self._begun += 1
            begin_thread(self._work)
        return task

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            with self._lock:
                if task.number > self._last:
                    continue
                self._running.add(task)
            task.run()
            with self._lock:
                if task.error is not None:
                    self._errors[task.number] = task.error
                    self._last = min(self._last, task.number)
                self._open.remove(task.number)
                self._running.remove(task)
            self._ends.put(None)

    def wait(self, tasks: Iterable[Task[Any]], seconds: float = math.inf) -> bool:
        """Wait until all are done; return False if they are not within so many seconds.

        Raises:
            BaseException: the error of the first task that has one, of these or another.
        """
        until = time.monotonic() + seconds
        for task in tasks:
            while not (self._failed() if self._errors else task.done):
                left = until - time.monotonic()
                if left <= 0:
                    return False
                with suppress(Empty):
                    self._ends.get(timeout=min(left, _LOOK))
        if self._errors:
            raise self._errors[min(tuple(self._errors))]
        return True

    def _failed(self) -> bool:
        """Tell whether no error can come any more of a task before the one that failed."""
        return min(tuple(self._open), default=math.inf) > self._last

    def dismiss(self) -> None:
        """Begin nothing more, and let the threads end."""
        with self._lock:
            self._last = -1
        if self._thin:
            self._thin = False
            BLAS.let_go()
        for _ in range(self._begun):
            self._tasks.put(None)

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
        late: BaseException | None = None
        self.dismiss()
        while self._running:
            try:
                time.sleep(_MOMENT)
            except BaseException as signal:  # noqa: BLE001  (raised below)
                late = signal
        if late is not None:
            raise late


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
