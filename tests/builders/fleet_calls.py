"""Calls of a fleet that misbehave, in a module that worker processes can import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def call(name: str, folder: str) -> str:
    """Do as the name says: `once-3` kills its process the first time, `always-4` every time."""
    mark = Path(folder, name)
    tries = len(mark.read_text()) if mark.exists() else 0
    mark.write_text("x" * (tries + 1))
    if name.startswith("always") or (name.startswith("once") and not tries):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return f"{name} is done"


def slow(name: str, folder: str) -> str:
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)
    return name
