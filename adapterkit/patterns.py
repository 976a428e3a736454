"""Regular expressions out of files that strangers wrote, read as PEFT reads them, in bounded time.

PEFT matches with Python's own engine. That one backtracks, for some expressions longer than anyone
waits, and nothing in its process can stop it; other engines know less syntax, mean something else
by it, or compile without a bound. So it is Python's engine, in a process that can be ended. Names
and their ends, which nearly all patterns are, need no such process.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import UncheckableError
from adapterkit.tables import shown

if TYPE_CHECKING:
    import subprocess

# Processor time for one expression on one name; thousands of times what real ones take.
SECONDS = 0.5
# Processor time for all expressions of one file.
SECONDS_OF_FILE = 2.0
# On the clock, where the machine is busy, or has no timer for processor time.
_PATIENCE = 10.0
_MEMORY = 512 << 20
# Letters, dots and escaped marks, at most anchored: one way to match, so a time that is linear.
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])*+\$?", re.ASCII)
_ENDING = r"(.*\.)?({})$"
_PROGRAM = """
import json, re, sys, time, warnings
warnings.simplefilter("ignore")
seconds, memory = float(sys.argv[1]), int(sys.argv[2])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except (ImportError, OSError, ValueError):
    pass
try:
    from signal import ITIMER_PROF, setitimer
except ImportError:
    ITIMER_PROF, setitimer = None, lambda timer, seconds: None
def answer(text, whole, name):
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        return {"error": f"is no regular expression ({error})"}
    if name is None:
        return {"names": list(pattern.groupindex)}
    try:
        match = pattern.fullmatch(name) if whole else pattern.match(name)
    except (MemoryError, RecursionError):
        return {"error": "takes too much memory"}
    return {"groups": match and match.groupdict()}
for line in sys.stdin:
    begin = time.process_time()
    setitimer(ITIMER_PROF, seconds)
    found = answer(*json.loads(line))
    setitimer(ITIMER_PROF, 0)
    found["seconds"] = time.process_time() - begin
    print(json.dumps(found), flush=True)
"""


@dataclass(slots=True)
class Allowance:
    """Processor time that the expressions of one file may take together.

    Attributes:
        seconds: what is left.
    """

    seconds: float = SECONDS_OF_FILE


@dataclass(frozen=True, slots=True)
class Match:
    """The named groups of an expression that matched."""

    groups: Mapping[str, Any]

    def groupdict(self) -> dict[str, Any]:
        """Return the named groups, as a match of `re` does."""
        return dict(self.groups)


class Expression:
    """One regular expression from a file; it is compiled and matched when it is first asked.

    Attributes:
        text: the expression.
    """

    __slots__ = ("_allowance", "_found", "_frame", "text")

    def __init__(
        self, text: str, allowance: Allowance | None = None, *, frame: str | None = None
    ) -> None:
        """Take an expression.

        Args:
            text: the expression.
            allowance: time that it shares with others; of its own without.
            frame: what a program puts it in, for `{}`, to match the begin of a name with; without,
                the expression itself must match the whole name.
        """
        self.text = text
        self._frame = frame
        self._allowance = allowance or Allowance()
        self._found: dict[str | None, Any] = {}

    @property
    def groupindex(self) -> tuple[str, ...]:
        """The names of its groups.

        Raises:
            UncheckableError: if it is no regular expression, or takes too long to compile.
        """
        return tuple(self._asked(None))

    def fullmatch(self, name: str) -> Match | None:
        """Match a name; the method is called as that of `re`.

        Raises:
            UncheckableError: if it is no regular expression, or the answer takes too long.
        """
        return None if (groups := self._asked(name)) is None else Match(groups)

    def fits(self, name: str) -> bool:
        """Tell whether a name matches.

        Raises:
            UncheckableError: as `fullmatch` does.
        """
        return self._asked(name) is not None

    def _asked(self, name: str | None) -> Any:
        if name not in self._found:
            if self._allowance.seconds <= 0:
                raise self._unchecked("was not evaluated: those before it took too long")
            text = self._frame.replace("{}", self.text) if self._frame else self.text
            ask = _plain if _PLAIN.fullmatch(self.text) else _ENGINE.ask
            answer = ask(text, name, whole=not self._frame)
            self._allowance.seconds -= answer["seconds"]
            if problem := answer.get("error"):
                raise self._unchecked(problem)
            self._found[name] = answer["names" if name is None else "groups"]
        return self._found[name]

    def _unchecked(self, problem: str) -> UncheckableError:
        return UncheckableError(f"pattern {shown(self.text)} {problem}")


def ending(pattern: str, allowance: Allowance) -> Expression:
    """Return a pattern of module names as PEFT's `rank_pattern` reads it: the end of a path."""
    return Expression(pattern, allowance, frame=_ENDING)


def _plain(text: str, name: str | None, *, whole: bool) -> dict[str, Any]:
    """Answer as the engine does, for what has no choices: in this very process."""
    pattern = re.compile(text)
    if name is None:
        return {"names": list(pattern.groupindex), "seconds": 0.0}
    match = pattern.fullmatch(name) if whole else pattern.match(name)
    return {"groups": match and match.groupdict(), "seconds": 0.0}


class _Engine:
    """Python's engine in a process of its own, started at the first question."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, text: str, name: str | None, *, whole: bool) -> dict[str, Any]:
        """Return the names of the groups (of no name), or what they hold; `error` says why not."""
        with self._lock:
            try:
                process = self._process or self._start()
            except OSError as error:
                reason = f"could not be evaluated (no process: {error})"
                return {"error": reason, "seconds": 0.0}
            answer = _line(process, json.dumps([text, whole, name]))
            if answer is None:
                self._end()
                return {"error": f"takes more than {SECONDS:g} s", "seconds": SECONDS}
            return cast("dict[str, Any]", json.loads(answer))

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """Leave the process to the parent that this one was forked from."""
        if self._process is not None:
            self._process.returncode = 0
        self._process = None
        self._lock = threading.Lock()

    def _start(self) -> subprocess.Popen[str]:
        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError("this program is no Python interpreter")
        import atexit
        import subprocess

        # Isolated: neither the environment nor the working directory has a say in what it imports.
        command = [sys.executable, "-I", "-S", "-c", _PROGRAM, str(SECONDS), str(_MEMORY)]
        process = subprocess.Popen(  # noqa: S603  (no part of it comes from a file)
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
        )
        self._process = process
        atexit.register(self.close)
        return process

    def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        # Closes the pipes and waits; there is nothing left to send.
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue
        process.wait()


def _line(process: subprocess.Popen[str], question: str) -> str | None:
    """Return the answer to a question; None if the process did not live to give it."""
    if process.stdin is None or process.stdout is None:
        return None
    watch = threading.Timer(_PATIENCE, process.kill)
    watch.daemon = True
    watch.start()
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
        return process.stdout.readline() or None
    except OSError:
        return None
    finally:
        watch.cancel()


_ENGINE = _Engine()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ENGINE.forget)
