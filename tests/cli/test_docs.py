"""The pages of docs/: their sessions and examples are run, and their lists are complete.

As in transcripts/*.md, what follows a command is what it prints; Python must end without an error,
and a block that begins with a comment of its name, of TOML too, is saved. The blocks of a page run
in order, in one directory that holds `base`, `my-adapter`, `style`, `facts` and other fixtures.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playing import ROUNDING, TIME_LIMIT, TRANSCRIPTS, environment, played
from terminal import PEFT, ROOT

import adapterkit

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
RUN = re.compile(r"^```(console|python|toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    path
    for path in sorted(DOCS.rglob("*.md"))
    if path.parent.name != "sessions" and RUN.search(path.read_text(encoding="utf-8"))
]
NAMES = {"my-adapter": "tiny", "style": "tiny", "facts": "tiny-weak"}


def done(block: re.Match[str], folder: Path, shell: Mapping[str, str]) -> str:
    """Run a block, and return it as it should be."""
    kind, text = block.groups()
    if kind == "console":
        text = played(text, folder, dict(shell))
    elif kind == "python":
        if name := re.match(r"# (\S+\.py)\n", text):
            (folder / name[1]).write_text(text, encoding="utf-8")
        program = [sys.executable, "-c", text]
        subprocess.run(program, cwd=folder, env=dict(shell), check=True, timeout=TIME_LIMIT)
    elif name := re.match(r"# (\S+\.toml)\n", text):
        (folder / name[1]).write_text(text, encoding="utf-8")
    else:
        tomllib.loads(text)
    return f"```{kind}\n{text}```"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_a_page_shows_is_what_happens(path: Path, tmp_path: Path) -> None:
    shell = environment(tmp_path)
    work = tmp_path / "work"
    shutil.copytree(PEFT, work)
    for name, source in NAMES.items():
        shutil.copytree(PEFT / source, work / name)
    written = path.read_text(encoding="utf-8")
    now = RUN.sub(lambda block: done(block, work, shell), written)
    if os.environ.get("ADAPTERKIT_ACCEPT"):
        path.write_text(now, encoding="utf-8")
    wanted = path.read_text(encoding="utf-8")
    assert ROUNDING.sub("(rounding)", now) == ROUNDING.sub("(rounding)", wanted)


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^.. auto\w+:: adapterkit\.(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted({*adapterkit.__all__, "torch"} - {"__version__"})


def test_every_page_is_in_a_table_of_contents() -> None:
    listed: set[Path] = set()
    for path in (DOCS / "index.md", DOCS / "sessions" / "index.md"):
        for block in re.findall(r":::{toctree}\n(.*?):::", path.read_text("utf-8"), re.DOTALL):
            names = [line for line in block.split("\n") if line and not line.startswith(":")]
            listed |= {path.parent / f"{name}.md" for name in names}
    assert listed == {*DOCS.rglob("*.md")} - {DOCS / "index.md"}


def test_every_transcript_is_a_page() -> None:
    pages = {path.stem for path in (DOCS / "sessions").glob("*.md")} - {"index"}
    assert pages == {path.stem for path in TRANSCRIPTS}
