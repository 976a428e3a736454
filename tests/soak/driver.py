"""The program with something wrong: `python driver.py FAULT FIRED WORDS...`.

FAULT is a name and its arguments with commas between; FIRED is a file that gets a line for every
step (`steps`), or that exists as soon as the fault has happened. Calls of `os` are what is hooked,
and steps are what the interpreter itself reports: neither depends on how the program is written.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = Callable[[str], None]

# What changes the folders of a disk, as audit events, and what has none but is a step too.
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
CALLS = ("fsync", "posix_fallocate")
WRITES = ("pwrite", "copy_file_range", "posix_fallocate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PATIENCE = 0.5  # seconds that a racer waits for others, which may have been refused already
_lock = threading.Lock()


def wrap(owner: Any, name: str, before: Call) -> None:
    """Have a function call another one first, which may raise."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*arguments: Any, **named: Any) -> Any:
        before(name)
        return inner(*arguments, **named)

    setattr(owner, name, outer)


def at_steps(call: Call) -> None:
    """Call before every step, from any thread, while signals are the program's own."""

    def own(name: str) -> None:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            call(name)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        flags = arguments[2] if event == "open" else 0
        if event in EVENTS or (isinstance(flags, int) and flags & _WRITING):
            own(event)

    sys.addaudithook(hook)
    for name in CALLS:
        if hasattr(os, name):
            wrap(os, name, lambda name: own(f"os.{name}"))


def numbered(number: int, call: Call) -> Call:
    """Return a function that calls from its n-th call on."""
    count = 0

    def counted(name: str) -> None:
        nonlocal count
        with _lock:
            count += 1
            due = count >= number
        if due:
            call(name)

    return counted


def steps(fired: Path) -> None:
    """Note every step."""
    noted = os.open(fired, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    at_steps(lambda name: (os.write(noted, f"{name}\n".encode()), None)[1])


def kill(fired: Path, name: str, number: str) -> None:
    """Send a signal just before a step, once."""
    done: list[str] = []

    def send(step: str) -> None:
        if done:
            return
        done.append(step)
        fired.touch()
        os.kill(os.getpid(), signal.Signals[name])

    at_steps(numbered(int(number), send))


def fail(fired: Path, function: str, error: str, number: str) -> None:
    """Raise in place of every call from the n-th on; only in workers, if it is no function of os.

    A disk that is full stays full.
    """
    module, _, name = function.rpartition(".")
    made = vars(errno).get(error)
    kinds = {"MemoryError": MemoryError, "KeyboardInterrupt": KeyboardInterrupt}

    def refuse(_: str) -> None:
        if module != "os" and threading.current_thread() is threading.main_thread():
            return
        fired.touch()
        if made is not None:
            raise OSError(made, os.strerror(made))
        raise kinds.get(error, RuntimeError)("injected")

    wrap(importlib.import_module(module), name, numbered(int(number), refuse))


def truncate(fired: Path, file: str, number: str) -> None:
    """Cut a file in half at the n-th write."""

    def cut(_: str) -> None:
        if not fired.exists():
            fired.touch()
            os.truncate(file, Path(file).stat().st_size // 2)

    counted = numbered(int(number), cut)
    for name in WRITES:
        wrap(os, name, counted)


def barrier(_: Path, folder: str, count: str, event: str) -> None:
    """Wait until all racers have come to the same step, for the first time each."""
    here = Path(folder)
    passed: list[bool] = []

    def meet(step: str) -> None:
        if step != event or passed:
            return
        passed.append(True)
        descriptor = os.open(here / str(os.getpid()), os.O_WRONLY | os.O_CREAT, 0o600)
        os.close(descriptor)
        patience = time.monotonic() + (10 * _PATIENCE if event == "start" else _PATIENCE)
        while len(list(here.iterdir())) < int(count) and time.monotonic() < patience:
            time.sleep(0.001)

    if event == "start":
        for name in (
            "numpy",
            "adapterkit.conversion",
            "adapterkit.merging.into",
            "adapterkit.auditing",
        ):
            with suppress(ImportError):
                importlib.import_module(name)
        meet(event)
    else:
        at_steps(meet)


def progress(fired: Path, error: str) -> None:
    """Raise in the progress callback of the library: WORDS are `merge A --into B -o OUT`."""
    import adapterkit

    kind = {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}[error]

    def callback(done: int, total: int) -> None:
        if 2 * done >= total:
            fired.touch()
            raise kind("injected")

    _, source, _, base, _, out = sys.argv[1:7]
    try:
        adapterkit.merge_into([source], base, out, progress=callback)
    except (ValueError, KeyboardInterrupt) as raised:
        sys.exit(7 if type(raised) is kind and str(raised) == "injected" else 8)
    sys.exit(0)


FAULTS = {f.__name__: f for f in (steps, kill, fail, truncate, barrier, progress)}


def main() -> None:
    """Arrange the fault, and run the program."""
    fault, fired, *words = sys.argv[1:]
    name, *arguments = fault.split(",")
    sys.argv = ["adapterkit", *words]
    from adapterkit_cli.main import main as program

    FAULTS[name](Path(fired), *arguments)
    program()


if __name__ == "__main__":
    main()
