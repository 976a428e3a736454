"""Signals end the program the way an exception does, so that temporary files are removed."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

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
    """Raise in the main thread when the program is told to end; a second request is ignored.

    A signal that the caller ignores (`nohup`) stays ignored.
    """
    before = {number: signal.getsignal(number) for number in _numbers()}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _numbers() -> list[signal.Signals]:
    return [signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__]


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    # Cleaning up takes a moment; an impatient second Ctrl-C must not cut it short.
    signal.signal(number, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(number)
