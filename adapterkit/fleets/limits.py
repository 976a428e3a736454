"""A limit to the time that one call may take, in the main thread of a process that may be lost."""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

# Seconds after which a process ends in which nothing else helped.
GRACE = 5.0


class TimeUpError(BaseException):
    """The time is up; no error that a reader could take for one of its own."""


@contextmanager
def limited(seconds: float | None) -> Generator[None]:
    """Raise `TimeUpError` in a block that takes longer; None is no limit.

    Where no exception gets through, as in a loop of compiled code, the process ends `GRACE` seconds
    later, and so it does at once where the system has no such timer.

    Raises:
        TimeUpError: after that time.
    """
    if seconds is None:
        yield
        return
    timer = hasattr(signal, "setitimer")
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123  (no path)
            faulthandler.dump_traceback_later(
                seconds + (GRACE if timer else 0.0), exit=True, file=nowhere
            )
            if timer:
                signal.signal(signal.SIGALRM, _time_up)
                signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
    finally:
        with suppress(TimeUpError):  # in this very moment
            _release()
        _release()


def _time_up(*_: object) -> None:
    raise TimeUpError


def _release() -> None:
    faulthandler.cancel_dump_traceback_later()
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
