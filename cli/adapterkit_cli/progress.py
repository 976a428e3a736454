"""How far long work is, on a terminal only."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adapterkit_cli import manner

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from rich.progress import Progress

# Seconds that work may take before a bar is shown.
_PATIENCE = 2.0


@contextmanager
def progress_bar(what: str, *, unit: str = "bytes") -> Generator[Callable[[int, int], None] | None]:
    """Show how much of how much is done, once it takes long, on a terminal only.

    Args:
        what: one word that says what is going on.
        unit: what is counted; `bytes` are shown with their size.
    """
    if not sys.stderr.isatty() or manner.plain_terminal() or manner.quiet():
        yield None
        return
    bar = _Bar(what, unit)
    try:
        yield bar.update
    finally:
        bar.end()


@contextmanager
def watching(what: str, unit: str = "steps") -> Generator[Callable[[int, int], None] | None]:
    """Show how far the functions of the library that run in the block are."""
    from adapterkit import watched

    with progress_bar(what, unit=unit) as progress, watched(progress):
        yield progress


class _Bar:
    """A bar that appears after a while; work in several parts says in which it is."""

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._begun = time.monotonic()
        self._shown: Progress | None = None
        self._part, self._done = 1, 0

    def update(self, done: int, total: int) -> None:
        begins, self._done = done < self._done, done
        self._part += begins
        if self._shown is not None and begins:
            self._shown.reset(self._shown.task_ids[0], total=total, description=self._words())
        if self._shown is not None:
            self._shown.update(self._shown.task_ids[0], completed=done, total=total)
        elif time.monotonic() - self._begun > _PATIENCE:
            self._shown = self._start(done, total)

    def _words(self) -> str:
        return self._what if self._part == 1 else f"{self._what}, part {self._part}"

    def _start(self, done: int, total: int) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        counted = DownloadColumn() if self._unit == "bytes" else MofNCompleteColumn()
        words = TextColumn("" if self._unit == "bytes" else self._unit)
        shown = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            counted,
            words,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        shown.add_task(self._words(), total=total, completed=done)
        shown.start()
        return shown

    def end(self) -> None:
        if self._shown is not None:
            self._shown.stop()
