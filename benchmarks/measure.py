"""Time whole processes, alternating, and give medians."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import dataclass
from subprocess import DEVNULL, Popen
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


# An installed program is compiled; a checkout is after its unmeasured run, unless told not to.
_ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Run:
    """One process: seconds of wall and CPU time, MiB of peak resident memory."""

    wall: float
    cpu: float
    peak: float


def installed(checkout: Path) -> list[str]:
    """Return the words before a command that make it the one of another checkout."""
    return ["env", f"PYTHONPATH={checkout.resolve()}:{checkout.resolve() / 'cli'}"]


def once(command: Sequence[str]) -> Run:
    """Run a command to its end; a failure is an error, not a fast run."""
    start = time.perf_counter()
    process = Popen(command, stdout=DEVNULL, stderr=DEVNULL, env=_ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed with exit code {process.returncode}: {' '.join(command)}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def alternate(
    commands: Mapping[str, Sequence[str]], rounds: int, fresh: Sequence[Path] = ()
) -> dict[str, Run]:
    """Run all commands in turn, once unmeasured and then `rounds` times; return medians.

    Before each run the outputs in `fresh` are removed, and what earlier runs wrote is on the disk.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            for path in fresh:
                shutil.rmtree(path, ignore_errors=True)
            if fresh:
                os.sync()
            result = once(command)
            if number:
                runs[name].append(result)
    return {
        name: Run(*(statistics.median(getattr(run, field) for run in found) for field in _FIELDS))
        for name, found in runs.items()
    }


_FIELDS = ("wall", "cpu", "peak")
