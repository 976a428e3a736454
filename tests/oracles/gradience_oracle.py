"""gradience 0.11 as a person runs it: many commands in one process, since it takes torch along.

    python tests/oracles/gradience_oracle.py < [[argument, ...], ...]

prints a list with the exit code and the standard output of each command.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Answer:
    """What one command did."""

    code: int
    out: str

    @property
    def json(self) -> dict[str, Any]:
        """The document on standard output; from fifty modules on, lines of progress precede it."""
        assert self.code == 0, self.out
        return json.loads(self.out[self.out.index("{") :])


def gradience(commands: Sequence[Sequence[object]]) -> list[Answer]:
    """Run commands of gradience, one after the other."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([[str(part) for part in command] for command in commands]),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # its threads wait for one another
    )
    return [Answer(code, out) for code, out in json.loads(done.stdout)]


def _run(arguments: list[str]) -> tuple[int, str]:
    from gradience.cli import main  # pyright: ignore[reportMissingImports]

    printed = io.StringIO()
    sys.argv = ["gradience", *arguments]
    with redirect_stdout(printed):
        try:
            code = main()
        except SystemExit as left:
            code = left.code
    return int(code or 0), printed.getvalue()


if __name__ == "__main__":
    json.dump([_run(arguments) for arguments in json.load(sys.stdin)], sys.stdout)
