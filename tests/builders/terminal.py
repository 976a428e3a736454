"""The command line, in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from adapterkit_cli.main import cli

ROOT = Path(__file__).parents[2]
PEFT = ROOT / "fixtures" / "peft"
BASE = PEFT / "base"
TINY = PEFT / "tiny"


def invoke(*arguments: str | Path, **settings: bool) -> Result:
    """Run the program in this process; a bug in it raises."""
    result = CliRunner().invoke(cli, list(map(str, arguments)), **settings)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def start(*arguments: str | Path, **settings: object) -> subprocess.Popen[str]:
    """Start the program in a process of its own, output captured unless told otherwise."""
    # Buffered, as it is for users: what is left in a buffer at the end can go wrong too.
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": usual} | settings
    return subprocess.Popen(
        [sys.executable, "-m", "adapterkit", *map(str, arguments)], text=True, **pipes
    )
