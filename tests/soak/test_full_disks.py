"""A full disk is exit code 1, and leaves nothing that was not there."""

from __future__ import annotations

import resource
import subprocess
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest

from soak.commands import COMMANDS, CONVERT_DIRECTORY, INTO_FILE, Command, each, former
from soak.judging import FULL, judged, said
from soak.runs import Run, digest, hidden, restored

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from soak.counts import Counts
    from soak.inputs import Inputs
    from soak.references import References
    from soak.scales import Scale

pytestmark = pytest.mark.slow

SIZE = 64 << 20


@each(COMMANDS)
def test_files_may_not_grow(
    command: Command,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    """As `ulimit -f` has it: a write past the limit fails, however much the disk has."""
    reference = references.of(command)
    limit = min(SIZE, reference.largest // 2)
    out, old = place / f"out{command.suffix}", former(command, inputs, place)
    for copy in [None, old] if scale.repeated else [None]:
        restored(out, copy)
        before, there = digest(out), hidden(out)
        words = command.words(inputs, out) + ["--force"] * (copy is not None)
        limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        ended = Run(words, prepare=limited).finish()
        judged(
            counts,
            ended,
            out,
            before=before,
            right=[reference.digest],
            codes=FULL,
            hidden_before=there,
        )
        said(counts, ended, out.name)
    counts.settle()


@each(COMMANDS, quick=[CONVERT_DIRECTORY, INTO_FILE])
def test_a_disk_is_full(
    command: Command,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    reference = references.of(command)
    old = former(command, inputs, place)
    with small_disk(place / "disk") as disk:
        out = disk / f"out{command.suffix}"
        for copy in [None, old] if scale.repeated else [None]:
            restored(out, copy)
            fill(disk, reference.total)
            before, there = digest(out), hidden(out)
            words = command.words(inputs, out) + ["--force"] * (copy is not None)
            ended = Run(words).finish()
            judged(
                counts,
                ended,
                out,
                before=before,
                right=[reference.digest],
                codes=FULL,
                hidden_before=there,
            )
            said(counts, ended, out.name)
    counts.settle()


@contextmanager
def small_disk(place: Path) -> Generator[Path]:
    """Mount a file system of 64 MB, where that is permitted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "soak", str(place)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)  # noqa: S607


def fill(disk: Path, needed: int) -> None:
    """Leave room for half of what is needed, if all of it would fit."""
    filler = disk / "filler"
    if not filler.exists() and needed < SIZE:
        filler.write_bytes(bytes(SIZE - needed // 2))
