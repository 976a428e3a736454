"""Signals end the program the way an exception does, so that temporary files are removed."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

# Seconds in which several signals are one request to end.
_ONE_REQUEST = 0.02
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Terminated(SystemExit):
    """A signal asked the program to end.

    Attributes:
        status: exit code, 128 and the number of the signal.
    """

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(self.status)


@contextmanager
def stopping_cleanly() -> Generator[None]:
    """Raise in the main thread when the program is told to end; told again, it dies at once.

    No more than one exception ever comes of signals, so that what cleans up is interrupted once at
    most. A signal that the caller ignores (`nohup`) stays ignored.
    """
    before = {number: signal.getsignal(number) for number in _numbers()}
    heeded = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        # `timeout` and others that pass signals on send one request twice.
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)
        time.sleep(_ONE_REQUEST)
        # From here on the operating system answers, even where no Python code gets to run.
        for each in heeded:
            signal.signal(each, signal.SIG_DFL)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(number)

    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def leave_at_once(status: int) -> NoReturn:
    """Exit without waiting for threads that compute what nobody will see any more."""
    sys.stderr.flush()
    os._exit(status)


def ended_by_signal(status: object) -> bool:
    """Tell whether an exit code says that a signal asked for it."""
    return any(status == 128 + number for number in _numbers())


def _numbers() -> list[signal.Signals]:
    return [signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__]
