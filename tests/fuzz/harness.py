"""Runs a target for some seconds in a process whose memory and time are limited.

    python -m fuzz.harness TARGET SEED SECONDS [COUNT]

prints one line of JSON: inputs, the worst time and memory, and every input whose outcome is neither
a result nor an AdapterKitError, or that a reference refuses and we read.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from adapterkit.errors import AdapterKitError
from fuzz.targets import TARGETS

MEMORY = 3 << 30
# Of the clock, for one input, on a machine that does other things too.
PATIENCE = 10.0


class Hang(BaseException):
    """An input took too long."""


def _stop(*_: object) -> None:
    raise Hang


def run(name: str, seed: int, seconds: float, count: int | None = None) -> dict[str, Any]:
    """Return what became of the inputs of one seed."""
    target = TARGETS[name]
    found: dict[str, Any] = {"target": name, "seed": seed, "inputs": 0, "read": 0, "findings": []}
    signal.signal(signal.SIGALRM, _stop)
    if target.accepts:
        target.accepts(target.seeds[0])  # what it imports is not counted
    begin, worst = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / target.file
        for beside, data in target.beside.items():
            (path.parent / beside).write_bytes(data)
        while time.monotonic() - begin < seconds and found["inputs"] != count:
            # Every input has a seed of its own, so that it can be made again alone.
            own = f"{name} {seed} {found['inputs']}"
            source = random.Random(own)
            data = target.change(source.choice(target.seeds), source)
            path.write_bytes(data)
            found["inputs"] += 1
            started = time.process_time()
            outcome = _outcome(target.call, path)
            worst = max(worst, time.process_time() - started)
            if outcome is None:
                found["read"] += 1
                if target.accepts and (reason := _refused(target.accepts, data)):
                    found["findings"].append(["wrong accept", own, reason])
            elif outcome:
                found["findings"].append([*outcome, own])
    found["worst_seconds"] = round(worst, 3)
    found["peak_mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return found


def _outcome(call: Any, path: Path) -> list[str] | tuple[()] | None:
    """Return None for a result, nothing for an error of ours, and what is wrong for all else."""
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        call(path)
    except AdapterKitError:
        return ()
    except Hang:
        return ["hang", traceback.format_exc(limit=-3)]
    except BaseException:
        return ["crash", traceback.format_exc(limit=-3)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def _refused(accepts: Any, data: bytes) -> str | None:
    try:
        accepts(data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def main() -> None:
    """Run the target that the arguments name."""
    name, seed, seconds, *count = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps(run(name, int(seed), float(seconds), int(count[0]) if count else None)))


if __name__ == "__main__":
    main()
