"""The ledger of a fleet: one SQLite file that can be killed at any moment, and asked by anyone."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adapterkit.errors import FormatError, WriteError

if TYPE_CHECKING:
    from types import TracebackType

    from adapterkit.fleets.actions import Outcome

_TABLE = """
create table if not exists job (
    path text, action text, options text, identity text, state text, exit_code integer,
    tries integer, seconds real, headline text, badness real, result text,
    primary key (path, action, options)
) without rowid
"""
_NOTE = """
insert into job values (?, ?, ?, ?, ?, ?, 1, ?, ?, ?, ?)
on conflict do update set
    tries = case when identity = excluded.identity then tries + 1 else 1 end,
    identity = excluded.identity, state = excluded.state, exit_code = excluded.exit_code,
    seconds = excluded.seconds, headline = excluded.headline, badness = excluded.badness,
    result = excluded.result
"""
_ROWS = """
select path, action, state, exit_code, tries, seconds, headline, badness, result from job
where action = ? and options = ? order by badness desc, path
"""


# Infinity as SQLite holds and sorts it on every system.
_INFINITE = 1e300


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to look at, and what it was when that was decided."""

    path: str
    identity: str


@dataclass(frozen=True, slots=True)
class FleetRow:
    """What is known of one adapter.

    Attributes:
        path: where it is.
        action: what was done.
        state: `done`, `refused` or `failed`.
        exit_code: what the command would exit with.
        tries: how often this content was looked at.
        seconds: how long the last time took; None if its process died.
        headline: one line for people.
        badness: worse adapters have more of it; infinite where there is no result.
        result: the command's result, as JSON has it.
    """

    path: str
    action: str
    state: str
    exit_code: int
    tries: int
    seconds: float | None
    headline: str
    badness: float
    result: Mapping[str, Any]


class Ledger:
    """Rows by path, action and options; one writer, any number of readers."""

    def __init__(self, path: Path) -> None:
        """Open or create it.

        Raises:
            FormatError: if the file is no ledger.
            WriteError: if it cannot be written.
        """
        self._path = path
        try:
            self._base = sqlite3.connect(path, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise _unwritten(path, error) from error
        try:
            # Readers do not wait for the writer; where that is not possible, SQLite says so here.
            self._base.execute("pragma journal_mode = wal")
            self._base.execute("pragma synchronous = normal")
            self._base.execute(_TABLE)
            self._base.execute("create table if not exists begun (action text primary key)")
        except sqlite3.OperationalError as error:
            self._base.close()
            raise _unwritten(path, error) from error
        except sqlite3.DatabaseError as error:
            self._base.close()
            raise FormatError(f"is no ledger ({error}); name another folder", path=path) from error

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._base.close()

    def open_jobs(
        self, jobs: Iterable[Job], action: str, options: str, *, tries: int
    ) -> Iterator[Job]:
        """Yield what is missing, has changed since, or failed fewer times than that."""
        asked = "select path, identity, state, tries from job where action = ? and options = ?"
        rows = self._base.execute(asked, (action, options))
        known = {path: rest for path, *rest in rows}
        for job in jobs:
            identity, state, tried = known.get(job.path, ("", "", 0))
            if identity != job.identity or (state == "failed" and tried < tries):
                yield job

    def note(self, action: str, options: str, rows: Iterable[tuple[Job, Outcome]]) -> None:
        """Write outcomes in one step.

        Raises:
            WriteError: if the disk is full or fails; what was written before stays.
        """
        values = [
            (
                *(job.path, action, options, job.identity, outcome.state, outcome.exit_code),
                *(outcome.seconds, outcome.headline, min(outcome.badness, _INFINITE)),
                json.dumps(outcome.result),
            )
            for job, outcome in rows
        ]
        try:
            self._base.execute("begin immediate")
            self._base.executemany(_NOTE, values)
            self._base.execute("commit")
        except sqlite3.OperationalError as error:
            raise _unwritten(self._path, error) from error

    def holds(self, action: str) -> bool:
        """Tell whether an action was begun here, whatever its options were."""
        asked = "select 1 from begun where action = ? union select 1 from job where action = ?"
        return self._base.execute(asked, (action, action)).fetchone() is not None

    def begin(self, action: str) -> None:
        """Note that an action has its tables here."""
        try:
            self._base.execute("insert or ignore into begun values (?)", (action,))
        except sqlite3.OperationalError as error:
            raise _unwritten(self._path, error) from error

    def rows(self, action: str, options: str, paths: Iterable[str]) -> Iterator[FleetRow]:
        """Yield what is known of some adapters, the worst first."""
        wanted = set(paths)
        for path, *rest, badness, result in self._base.execute(_ROWS, (action, options)):
            if path in wanted:
                action, state, exit_code, tries, seconds, headline = rest
                yield FleetRow(
                    path=path,
                    action=action,
                    state=state,
                    exit_code=exit_code,
                    tries=tries,
                    seconds=seconds,
                    headline=headline,
                    badness=math.inf if badness >= _INFINITE else badness,
                    result=json.loads(result),
                )


def _unwritten(path: Path, error: sqlite3.OperationalError) -> WriteError:
    message = f"could not be written ({error}); what it has is kept, and the same again goes on"
    return WriteError(message, path=path)
