"""Run the program, disturb it, and tell what it left behind."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DRIVER = Path(__file__).with_name("driver.py")
# Seconds within which the program ends after an error or a signal. More is a hang.
PATIENCE = 10.0
# Seconds that an undisturbed run may take on a busy machine.
WHOLE = 600.0
# Seconds of computing in that time that are more than waiting.
_WORK = 0.2
# What is left of one run of the program, by relative path; None where there is nothing.
Digest = dict[str, str] | None


class Clock:
    """Seconds during which this machine ran: one that is paused as a whole is not the program's.

    A thread that does nothing but sleep wakes late when nothing on the machine runs.
    """

    TICK = 0.05
    # A thread that has nothing to do gets its turn within this, on a machine that is merely busy.
    LATE = 0.5

    def __init__(self) -> None:
        self.paused = 0.0
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(self.TICK)
            now = time.monotonic()
            late = now - before - self.TICK
            self.paused += late if late > self.LATE else 0.0
            before = now

    def seconds(self) -> float:
        """Return the seconds since some moment, without pauses."""
        return time.monotonic() - self.paused


CLOCK = Clock()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended.

    Attributes:
        words: its arguments.
        code: exit code, or minus the signal that killed it.
        hung: whether it had to be killed.
        seconds: from the start, or from the last signal, to the end.
        stderr: what it said.
    """

    words: tuple[str, ...]
    code: int
    hung: bool
    seconds: float
    stderr: str

    def __str__(self) -> str:
        """Return everything that a reader of a failed test asks for."""
        line = " ".join(Path(word).name for word in self.words)
        return f"{line}: exit {self.code} after {self.seconds:.2f} s; {self.stderr[-500:]!r}"


class Run:
    """The program in a session of its own, its stderr in a file that never blocks it."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        fault: str | None = None,
        fired: Path | None = None,
        prepare: Callable[[], Any] | None = None,
    ) -> None:
        self.words = tuple(words)
        start = ["-m", "adapterkit"] if fault is None else [str(DRIVER), fault, str(fired)]
        self.stderr = Path(f"/proc/self/fd/{os.memfd_create('stderr')}")
        self.began = CLOCK.seconds()
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *start, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=prepare,  # noqa: PLW1509  (there are no threads here)
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TERM": "dumb"},
            )

    def until_ready(self) -> None:
        """Wait until signals are the program's own: before, they are the interpreter's."""
        status = Path(f"/proc/{self.process.pid}/status")
        while self.process.poll() is None:
            caught = status.read_text().partition("SigCgt:")[2].split("\n")[0].strip()
            if caught and int(caught, 16) >> (signal.SIGTERM - 1) & 1:
                break
            time.sleep(0.001)
        self.began = CLOCK.seconds()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; how long it takes counts from here."""
        self.began = CLOCK.seconds()
        self.process.send_signal(number)

    def end(self, within: float) -> Ended:
        """Wait for the end; a run that is still there after that is killed, and was a hang."""
        deadline = CLOCK.seconds() + within
        while (left := deadline - CLOCK.seconds()) > 0 and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(left)
        return self._ended()

    def finish(self) -> Ended:
        """Wait for the end of what may take as long as others take the machine from it.

        A hang is a stretch of seconds in which the program neither computes nor reads nor writes:
        it asks its threads now and then, which takes less than `_WORK`.
        """
        latest = CLOCK.seconds() + WHOLE
        while CLOCK.seconds() < latest and self.process.poll() is None:
            done, until = self._work(), CLOCK.seconds() + PATIENCE
            while CLOCK.seconds() < until and self.process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.5)
            if self._work() - done < _WORK:
                break
        return self._ended()

    def _work(self) -> float:
        """Return the seconds of computing so far; a byte that was read or written counts as one."""
        own = Path(f"/proc/{self.process.pid}")
        try:
            ticks = (own / "stat").read_text().rpartition(")")[2].split()[11:13]
            moved = [int(line.split()[1]) for line in (own / "io").read_text().splitlines()[:2]]
        except OSError:  # it has just ended
            return math.inf
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") + sum(moved)

    def _ended(self) -> Ended:
        hung = self.process.poll() is None
        seconds = CLOCK.seconds() - self.began
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        text = self.stderr.read_bytes().decode(errors="replace")
        os.close(int(self.stderr.name))
        return Ended(self.words, code, hung, seconds, text)


def undisturbed(words: Sequence[str]) -> Ended:
    """Run from the moment at which a signal is the program's own."""
    run = Run(words)
    run.until_ready()
    return run.finish()


def disturbed(
    words: Sequence[str], signals: Sequence[signal.Signals], after: float, *, between: float = 0.05
) -> Ended:
    """Run and send signals, the first after so many seconds of work, at rest between them."""
    run = Run(words)
    run.until_ready()
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(after)
    for index, number in enumerate(signals):
        if index:
            time.sleep(between)
        if run.process.poll() is None:
            run.send(number)
    return run.end(PATIENCE)


def digest(path: Path) -> Digest:
    """Return the hash of every file, by relative path; links count as such, whatever they name."""
    if path.is_symlink() or not path.is_dir():
        return {"": _hash(path)} if os.path.lexists(path) else None
    found = sorted(file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return {str(file.relative_to(path)): _hash(file) for file in found}


def _hash(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    if not path.is_file():
        return f"mode {path.stat().st_mode:o}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference(found: Digest, expected: Digest) -> str:
    """Say in what two destinations differ."""
    if found is None or expected is None:
        return f"{'absent' if found is None else 'there'}, not as expected"
    names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
    return ", ".join(f"{n or 'the file'} ({_what(n, found, expected)})" for n in names)


def _what(name: str, found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    return "missing" if name not in found else "extra" if name not in expected else "differs"


def hidden(destination: Path) -> set[str]:
    """Return the names of what stands hidden beside a destination and belongs to it."""
    return {file.name for file in destination.parent.glob(f".{destination.name}.*")}


def lock_name(destination: Path) -> str:
    """Return the name of the lock, which a killed run may leave."""
    return f".{destination.name}.adapterkit.lock"


def removed(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def restored(path: Path, copy: Path | None) -> None:
    """Put a copy of something at a path, or nothing."""
    removed(path)
    if copy is not None and copy.is_dir():
        shutil.copytree(copy, path, symlinks=True)
    elif copy is not None:
        shutil.copy2(copy, path)
