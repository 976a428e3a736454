"""Do one thing to every adapter of a fleet, and keep what came of each."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from adapterkit.base import BaseModel
from adapterkit.destination import check_name
from adapterkit.errors import AdapterKitError, DestinationExistsError, UsageError, WriteError
from adapterkit.fleets.actions import Outcome, check_action, died, late, perform
from adapterkit.fleets.discovery import Reading, discover, identity
from adapterkit.fleets.execution import carried_out, dask_executor, process_pool
from adapterkit.fleets.ledger import FleetRow, Job, Ledger
from adapterkit.text import PLAIN, Pen, Shown, columns, count, from_here

LEDGER = "ledger.sqlite"
# What an action's tables end in: they stand beside the ledger that they are made from.
TABLES = ("jsonl", "csv", "html")
# Exit codes of several inputs: the worst of them, in this order.
_ORDER = (3, 4, 1, 5)
# Adapters that are listed.
_SHOWN = 20


@dataclass(frozen=True, kw_only=True, repr=False)
class FleetReport(Shown):
    """What was done to a fleet, and what is known of each adapter.

    Attributes:
        action: what was done.
        ledger: the SQLite file that holds every row.
        adapters: how many there are.
        looked_at: how many of them were new, changed, or failed the last time.
        done: how many have a result.
        refused: how many have none, and no second try would change that.
        failed: how many failed; they are tried again by the next run.
        results: what is known of each, the worst first.
    """

    action: str
    ledger: str
    adapters: int
    looked_at: int
    done: int
    refused: int
    failed: int
    results: tuple[FleetRow, ...]
    _entries = "results"

    @property
    def exit_code(self) -> int:
        """The worst of what the command would exit with: 3, 4, 1, 5, 0."""
        codes = {row.exit_code for row in self.results}
        return next((code for code in _ORDER if code in codes), 0)

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what became of all, and of each of the worst."""
        adapters = count(self.adapters, "adapter")
        states = f"{self.done:,} done, {self.refused:,} refused, {self.failed:,} failed"
        lines = [f"{self.action}: {adapters}, {self.looked_at:,} looked at now: {states}"]
        worst = [row for row in self.results if row.state != "done" or row.exit_code]
        told = [
            (from_here(row.path), row.state, row.headline.split("\n")[0])
            for row in pen.shown(worst, _SHOWN)
        ]
        lines += [columns(told, pen=pen)] if told else []
        lines += [f"and {more:,} more in {self.ledger}"] if (more := len(worst) - len(told)) else []
        return "\n".join(lines)


def run_fleet(
    action: str,
    sources: Sequence[Path | str],
    folder: Path | str,
    *,
    options: Mapping[str, Any] | None = None,
    executor: Executor | None = None,
    dask: str | None = None,
    jobs: int | None = None,
    tries: int = 3,
    timeout: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FleetReport:
    """Validate, audit, convert, inspect or fingerprint every adapter; what is known is kept.

    The ledger in `folder` may be killed at any moment: the next call does what is missing, what
    has changed since, and what failed.

    Args:
        action: `validate`, `audit`, `convert`, `inspect` or `fingerprint`.
        sources: adapters, hub ids, folders to search, `.txt` files with a source in each line, or
            `hub-cache`.
        folder: where the ledger is, and with `convert` what was written; made if it is not there.
        options: further arguments of the function of that name, such as `base` or `targets`.
        executor: where the calls are made; by default processes of this machine.
        dask: address of a Dask scheduler, in place of an executor.
        jobs: how many run side by side; by default one for each processor.
        tries: how often an adapter that fails is tried in all.
        timeout: seconds that one adapter may take, in processes of this machine; more is a failure.
        progress: takes how many adapters are done, and of how many.

    Raises:
        UsageError: if the action is unknown, Dask is not there, or a time-out is given to what is
            no process of this machine.
        NotFoundError: if there is nothing at a source.
        WriteError: if another process writes the ledger, or it cannot be written, or files of
            another origin have the names of its tables.
        UncheckableError: if an executor of yours broke; what was done is kept.
    """
    check_action(action)
    if timeout is not None and (dask is not None or executor is not None):
        raise UsageError("timeout (--timeout) is for processes of this machine, not for executors")
    folder = Path(folder)
    check_name(folder)
    given = _given(action, dict(options or {}), folder)
    told = json.dumps([given, import_module("adapterkit").__version__], sort_keys=True)
    found = discover(sources, Reading(given.get("dialect"), given.get("as_format")))
    with ExitStack() as stack:
        ledger = stack.enter_context(_opened(folder, stack, action))
        if not ledger.holds(action):
            _check_tables(folder, action)
        ledger.begin(action)
        every, unread = _jobs(found, _mark(given))
        ledger.note(action, told, unread)
        paths = [str(path) for path in found]
        open_jobs = list(ledger.open_jobs(every, action, told, tries=tries))
        workers = jobs or os.cpu_count() or 1
        if dask is not None:
            executor, workers = stack.enter_context(dask_executor(dask))
        chosen = executor
        count = 0

        def note(rows: list[tuple[Job, Outcome]]) -> None:
            nonlocal count
            ledger.note(action, told, rows)
            count += len(rows)
            if progress is not None:
                progress(count, len(open_jobs))

        begun: dict[str, float] = {}

        def call(job: Job) -> tuple[Any, ...]:
            begun[job.path] = time.monotonic()
            return perform, action, job.path, given, timeout

        def lost(job: Job, error: BaseException) -> Outcome:
            """Say why a process ended that had this one call: a limit that it would not obey."""
            if timeout is not None and time.monotonic() - begun[job.path] > timeout:
                return late(timeout)
            return died(str(error) or type(error).__name__)

        carried_out(
            open_jobs,
            call,
            lambda: chosen if chosen is not None else process_pool(workers),
            note,
            lost,
            workers=workers,
        )
        rows = tuple(ledger.rows(action, told, paths))
    states = Counter(row.state for row in rows)
    return FleetReport(
        action=action,
        ledger=str(folder / LEDGER),
        adapters=len(found),
        looked_at=len(open_jobs),
        **{state: states[state] for state in ("done", "refused", "failed")},
        results=rows,
    )


def _given(action: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    if isinstance(base := options.get("base"), BaseModel):
        options["base"] = str(base.path)  # a worker opens it for itself
    if action != "convert":
        return options
    from adapterkit.saving import destination_format

    written = folder / "converted"
    target = destination_format(written, options.get("to"), force=True)
    suffix = target.suffixes[0] if target.suffixes else "" if target.files else ".safetensors"
    return {**options, "to": target.name, "folder": str(written), "suffix": suffix}


def _opened(folder: Path, stack: ExitStack, action: str) -> Ledger:
    """Return the ledger of a folder, which nobody else writes meanwhile."""
    from filelock import FileLock, Timeout

    if folder.exists() and not folder.is_dir():
        raise WriteError("is a file, and a ledger needs a folder; name another", path=folder)
    if not (folder / LEDGER).exists():
        _check_tables(folder, action)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{LEDGER}.lock", timeout=0)
        stack.enter_context(lock)
    except Timeout:
        message = "its ledger is being written by another process; wait, or name another folder"
        raise WriteError(message, path=folder) from None
    except OSError as error:
        raise WriteError(f"could not be made ({error.strerror or error})", path=folder) from error
    return Ledger(folder / LEDGER)


def _check_tables(folder: Path, action: str) -> None:
    """Refuse a folder whose tables are somebody else's: nothing of the action is in its ledger."""
    for name in (f"{action}.{suffix}" for suffix in TABLES):
        if (folder / name).exists():
            message = (
                f"exists already, and is no table of this folder's {LEDGER}; move it, or name "
                "another folder"
            )
            raise DestinationExistsError(message, path=folder / name)


def _mark(options: Mapping[str, Any]) -> str:
    """Return what changes when the base does, or the file of a dialect."""
    given = [Path(options[name]) for name in ("base", "dialect") if options.get(name) is not None]
    return "".join(identity(path) for path in given if path.exists())


def _jobs(found: Iterable[Path], mark: str) -> tuple[list[Job], list[tuple[Job, Outcome]]]:
    """Return a job for each adapter, and the outcome of those that cannot even be looked at."""
    jobs: list[Job] = []
    unread: list[tuple[Job, Outcome]] = []
    for path in found:
        try:
            jobs.append(Job(str(path), identity(path) + mark))
        except AdapterKitError as error:
            told = {"error": {"kind": type(error).__name__, "message": str(error), "exit": 3}}
            outcome = Outcome("refused", error.exit_code, str(error), float("inf"), told)
            unread.append((Job(str(path), ""), outcome))
    return jobs, unread
