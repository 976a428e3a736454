"""Runs a target for some seconds in a process whose memory and time are limited.

    python -m fuzz.harness TARGET SEED SECONDS [COUNT]

prints one line of JSON: inputs, the worst time and memory, and every input whose outcome is neither
a result nor an AdapterKitError, or that a reference refuses or reads otherwise. `make` gives the
files of an input again, by the words that a finding ends with.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapterkit.errors import AdapterKitError
from fuzz.mutations import changed
from fuzz.samples import Sample
from fuzz.targets import TARGETS, Target, sample_of

MEMORY = 3 << 30
# Of the clock, for one input, on a machine that does other things too.
PATIENCE = 10.0
# Of one kind are shown.
MOST = 20


class Hang(BaseException):
    """An input took too long."""


def _stop(*_: object) -> None:
    raise Hang


def make(own: str) -> Sample:
    """Return the input that is called `TARGET SEED NUMBER`."""
    name = own.rsplit(" ", 2)[0]
    source = random.Random(own)
    sample = sample_of(name, source.choice)
    files = dict(sample.files)
    choice = source.choice(sorted(files))
    files[choice] = changed(choice, files[choice], source)
    return Sample(files, sample.given)


class Room:
    """A folder that holds the files of one input after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, bytes] = {}

    def put(self, sample: Sample) -> Path:
        """Write the files, those that are there already not again; return what is to be read."""
        if self._held.keys() != sample.files.keys():
            for path in self._folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._held = {}
        for name, data in sample.files.items():
            if self._held.get(name) != data:
                path = self._folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        self._held = dict(sample.files)
        return self._folder / sample.given if sample.given else self._folder


def run(name: str, seed: int, seconds: float, count: int | None = None) -> dict[str, Any]:
    """Return what became of the inputs of one seed."""
    target = TARGETS[name]
    found: dict[str, Any] = {"target": name, "seed": seed, "inputs": 0, "read": 0, "findings": []}
    signal.signal(signal.SIGALRM, _stop)
    warnings.simplefilter("error", RuntimeWarning)  # those of numpy
    begin, worst = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        room = Room(Path(folder))
        # What it imports is not counted, and an import that is cut short breaks all that follow.
        for sample in target.samples[:1]:
            with suppress(AdapterKitError):
                target.call(room.put(sample))
        while time.monotonic() - begin < seconds and found["inputs"] != count:
            # Every input has a seed of its own, so that it can be made again alone.
            own = f"{name} {seed} {found['inputs']}"
            path = room.put(make(own))
            found["inputs"] += 1
            started = time.process_time()
            kind, words = outcome(target, path)
            worst = max(worst, time.process_time() - started)
            found["read"] += kind == "read"
            if kind not in {"read", "refused"} and len(found["findings"]) < MOST:
                found["findings"].append([kind, words, own])
    found["worst_seconds"] = round(worst, 3)
    found["peak_mebibytes"] = _peak() >> 10
    return found


def _peak() -> int:
    """Return the most KiB that this process had; `getrusage` counts those of its parent too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def outcome(target: Target, path: Path) -> tuple[str, str]:
    """Return `read`, `refused`, or what is wrong, and its words."""
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        made = target.call(path)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except AdapterKitError:
        return "refused", ""
    except Hang:
        return "hang", traceback.format_exc(limit=-4)
    except BaseException:
        return "crash", traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if target.judge is None:
        return "read", ""
    return _judged(target, path, made)


def _judged(target: Target, path: Path, made: Mapping[str, Any]) -> tuple[str, str]:
    assert target.judge is not None
    try:
        target.judge(path, made)
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if not any(each in words for each in target.forgiven):
            return "wrong accept", words[-300:]
    return "read", ""


def main() -> None:
    """Run the target that the arguments name."""
    name, seed, seconds, *count = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps(run(name, int(seed), float(seconds), int(count[0]) if count else None)))


if __name__ == "__main__":
    main()
