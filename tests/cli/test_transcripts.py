"""The terminal sessions in transcripts/*.md are run and must look as they are written there.

A block that starts with ```console holds lines `$ command`, each followed by what it prints, stdout
and stderr together, and by `[exit N]` unless N is 0. The blocks of a file run one after the other
in one directory that starts with copies of the adapters and bases in fixtures/peft/.

Errors below 1e-6 are rounding; their last digits, and the worst module, depend on the machine's
BLAS: of two such errors only the size is compared.

To write down what the program prints now: ADAPTERKIT_ACCEPT=1 pytest tests/cli/test_transcripts.py
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from playing import ROUNDING, TRANSCRIPTS, environment, played
from terminal import PEFT

pytestmark = pytest.mark.slow

BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)


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
