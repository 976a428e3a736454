"""Sessions of a terminal, played again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TRANSCRIPTS = sorted((Path(__file__).parents[1] / "transcripts").glob("*.md"))


# What a machine rounds in its own way, and tenths of a kB of files that hold such figures.
ROUNDING = re.compile(r"\b\d(\.\d+)?e-(0[7-9]|1\d)( \([\w.]+\))?|(?<=\d)\.\d(?= kB)")


TIME_LIMIT = 60.0  # seconds; a hang must end


def environment(folder: Path) -> dict[str, str]:
    """A shell that finds `adapterkit`, no hub cache, and nothing of the user's settings."""
    program = folder / ".bin" / "adapterkit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m adapterkit "$@"\n')
    program.chmod(0o755)
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    path = f"{program.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"
    fixed = {"LC_ALL": "C.UTF-8", "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    return kept | fixed | {"PATH": path, "HOME": str(folder)}


def played(block: str, folder: Path, shell: dict[str, str]) -> str:
    """Return the block as it should be: its commands with what they print now."""
    lines: list[str] = []
    for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=folder,
            env=shell,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=TIME_LIMIT,
            check=False,
        )
        lines += [f"$ {command}", *done.stdout.splitlines()]
        lines += [f"[exit {done.returncode}]"] if done.returncode else []
    return "".join(f"{line}\n" for line in lines)
