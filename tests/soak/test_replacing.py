"""What is no file or adapter of ours is never replaced, and what is nobody's business stays."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from soak.commands import (
    BANK,
    COMMANDS,
    COMPRESS,
    CONVERT_DIRECTORY,
    CONVERT_FILE,
    INTO_DIRECTORY,
    INTO_FILE,
    MERGE,
    REPORT,
    Command,
    each,
    former,
    whole_only,
)
from soak.judging import said
from soak.runs import Run, difference, digest, hidden

if TYPE_CHECKING:
    from collections.abc import Callable

    from soak.counts import Counts
    from soak.inputs import Inputs
    from soak.references import References

pytestmark = pytest.mark.slow


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def device(path: Path) -> Path:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes device nodes")
    return path


def endpoint(path: Path) -> Path:
    """Bind a socket, by a name that is short enough for one."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)
    return path


def foreign(path: Path) -> Path:
    """Make a folder that holds no adapter, but files that could be taken for a part of one."""
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")
    (path / "data.safetensors").write_bytes(b"not read")
    return path


def link(path: Path) -> Path:
    """Make a link to somebody's file, and return that."""
    target = path.with_name("elsewhere")
    target.write_text("somebody's")
    path.symlink_to(target.name)
    return target


def state(path: Path) -> Any:
    """Return what must not change: kind, device and node, and all content."""
    found = os.lstat(path)
    return found.st_mode, found.st_ino, found.st_rdev, digest(path)


@pytest.mark.parametrize(
    "make",
    [
        pipe,
        foreign,
        pytest.param(device, marks=whole_only(quick=False)),
        pytest.param(endpoint, marks=whole_only(quick=False)),
    ],
)
@each(
    [CONVERT_FILE, CONVERT_DIRECTORY, INTO_DIRECTORY, INTO_FILE, REPORT, BANK],
    quick=[CONVERT_FILE, CONVERT_DIRECTORY, REPORT],
)
def test_force_spares_what_is_not_ours(
    command: Command,
    make: Callable[[Path], Path],
    inputs: Inputs,
    place: Path,
    counts: Counts,
) -> None:
    out = place / f"out{command.suffix}"
    spared = make(out)
    before = state(spared)
    ended = Run([*command.words(inputs, out), "--force"]).finish()
    counts.ran(ended, {1})
    if not os.path.lexists(spared) or state(spared) != before:
        counts.add("replaced", f"the {make.__name__}: {ended}")
    if hidden(out):
        counts.add("left", f"{sorted(hidden(out))}: {ended}")
    said(counts, ended, out.name)
    counts.settle()


@each([CONVERT_FILE, INTO_FILE, REPORT, BANK], quick=[CONVERT_FILE])
def test_force_does_not_follow_links(
    command: Command, inputs: Inputs, references: References, place: Path, counts: Counts
) -> None:
    out = place / f"out{command.suffix}"
    target = link(out)
    before = state(target)
    ended = Run([*command.words(inputs, out), "--force"]).finish()
    counts.ran(ended, {0, 1})
    if state(target) != before:
        counts.add("replaced", f"what a link names: {ended}")
    if ended.code == 0 and digest(out) != references.of(command).digest:
        counts.add("wrong", f"behind a link: {ended}")
    counts.settle()


@each([*COMMANDS, REPORT, BANK], quick=[CONVERT_DIRECTORY, INTO_FILE, REPORT, BANK])
def test_nothing_is_replaced_unasked(
    command: Command, inputs: Inputs, place: Path, counts: Counts
) -> None:
    out = former(command, inputs, place)
    before = state(out)
    ended = Run(command.words(inputs, out)).finish()
    counts.ran(ended, {1})
    if state(out) != before:
        counts.add("replaced", str(ended))
    said(counts, ended, out.name)
    counts.settle()


@each(
    [CONVERT_DIRECTORY, MERGE, COMPRESS, INTO_DIRECTORY],
    quick=[CONVERT_DIRECTORY, INTO_DIRECTORY],
)
def test_force_keeps_what_is_not_the_adapters(
    command: Command, inputs: Inputs, references: References, place: Path, counts: Counts
) -> None:
    out = former(command, inputs, place).rename(place / "out")
    outside = place / "outside"
    outside.mkdir()
    (outside / "kept").write_text("somebody's")
    weights = out / ("model.safetensors" if command.model else "adapter_model.safetensors")
    shutil.move(weights, outside / weights.name)
    weights.symlink_to(outside / weights.name)
    if not command.model:
        (out / "adapter_model.bin").write_bytes(b"of the former adapter")
    (out / "notes.txt").write_text("mine")
    (out / "folder").symlink_to(outside)
    (out / "checkpoint-10").mkdir()
    (out / "checkpoint-10" / "optimizer.pt").write_bytes(b"state")
    kept = ("notes.txt", "folder", "checkpoint-10/optimizer.pt")
    before, away = digest(out), digest(outside)
    assert before
    ended = Run([*command.words(inputs, out), "--force"]).finish()
    counts.ran(ended, {0, 1})
    found = digest(out) or {}
    if digest(outside) != away or any(found.get(name) != before[name] for name in kept):
        counts.add("replaced", f"{difference(found, before)}: {ended}")
    ours = {name: value for name, value in found.items() if name not in kept}
    right = references.of(command).digest
    if ended.code == 0 and ours != right:
        counts.add("wrong", f"{difference(ours, right)}: {ended}")
    if ended.code != 0 and found != before:
        counts.add("replaced", f"{difference(found, before)}: {ended}")
    counts.settle()
