"""The terminal sessions in transcripts/*.md are run and must look as they are written there.

A block that starts with ```console holds lines `$ command`, each followed by what it prints, stdout
and stderr together, and by `[exit N]` unless N is 0. The blocks of a file run one after the other
in one directory that starts with copies of the adapters and bases in fixtures/peft/.

Errors below 1e-6 are rounding; their last digits, and the worst module, depend on the machine's
BLAS: of two such errors only the size is compared.

To write down what the program prints now: ADAPTERKIT_ACCEPT=1 pytest tests/test_transcripts.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import PEFT

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.md"))
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
ROUNDING = re.compile(r"\b\d(\.\d+)?e-(0[7-9]|1\d)( \([\w.]+\))?")
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


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_terminal_looks_as_written(path: Path, tmp_path: Path) -> None:
    shell = environment(tmp_path)
    work = tmp_path / "work"
    shutil.copytree(PEFT, work)
    written = path.read_text(encoding="utf-8")
    assert BLOCK.search(written), "no session in this file"
    now = BLOCK.sub(lambda block: played(block[0], work, shell), written)
    if os.environ.get("ADAPTERKIT_ACCEPT"):
        path.write_text(now, encoding="utf-8")
    wanted = path.read_text(encoding="utf-8")
    assert ROUNDING.sub("(rounding)", now) == ROUNDING.sub("(rounding)", wanted)


def test_every_command_has_a_transcript() -> None:
    from adapterkit_cli.main import COMMANDS

    sessions = "".join(path.read_text(encoding="utf-8") for path in TRANSCRIPTS)
    assert [name for name in COMMANDS if f"$ adapterkit {name}" not in sessions] == []
