"""A killed merge goes on to the same bytes, and is never misled by what was changed meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from random import Random
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM
from typing import TYPE_CHECKING, Any

import pytest

from soak.commands import INTO_DIRECTORY, INTO_FILE, RESUMED, Command, each, whole_only
from soak.inputs import CHANGED, linked, own, poke, shard_of
from soak.judging import CODES, REFUSED, judged, said, succeeded
from soak.runs import Run, digest, disturbed, hidden, removed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from soak.counts import Counts
    from soak.inputs import Inputs
    from soak.references import References
    from soak.runs import Digest
    from soak.scales import Scale

pytestmark = pytest.mark.slow


@each(RESUMED, quick=[INTO_DIRECTORY])
def test_resumed_after_any_moment(
    command: Command,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    random = Random(command.name)  # noqa: S311  (the same on every machine)
    reference, out = references.of(command), place / f"out{command.suffix}"
    words = [*command.words(inputs, out), "--resume"]
    for number in range(scale.kills):
        removed(out)
        for _ in range(random.choice((1, 2))):
            signal = random.choice((SIGKILL, SIGINT, SIGTERM, SIGHUP)) if number else SIGKILL
            ended = disturbed(words, [signal], random.uniform(0.2, 1.05) * reference.seconds)
            if judged(
                counts, ended, out, before=None, right=[reference.digest], codes=CODES[signal]
            ):
                removed(out)
        succeeded(counts, Run(words).finish(), out, reference.digest)
    counts.settle()


def flipped(staging: Path, names: set[str], place: Path) -> None:
    """Change a byte in every megabyte of what is staged, and no size or time."""
    del names, place
    for file in staging.rglob("*"):
        if file.is_file() and not file.suffix.startswith(".json"):
            times = file.stat()
            with file.open("r+b") as opened:
                for at in range(4096, times.st_size, 1 << 20):
                    opened.seek(at)
                    (byte,) = opened.read(1)
                    opened.seek(at)
                    opened.write(bytes([byte ^ 0x55]))
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def zeroed(staging: Path, names: set[str], place: Path) -> None:
    """Lose what is staged as a disk may after a crash: sizes are there, bytes are not."""
    del names, place
    for file in staging.rglob("*"):
        if file.is_file() and not file.suffix.startswith(".json"):
            size = file.stat().st_size
            os.truncate(file, 0)
            os.truncate(file, size)


def linked_file(staging: Path, names: set[str], place: Path) -> None:
    """Put a link to somebody's file of the same size in the place of the largest."""
    del names
    largest = max((f for f in staging.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    target = place / "victim" / "file"
    with target.open("wb") as file:
        file.truncate(largest.stat().st_size)
    largest.unlink()
    largest.symlink_to(target)


def linked_folder(staging: Path, names: set[str], place: Path) -> None:
    """Put a link to a folder elsewhere in the place of the staging folder."""
    del names
    staging.symlink_to(shutil.move(staging, place / "victim" / "folder"))


def garbled(text: str) -> Callable[[Path, set[str], Path], None]:
    """Return what replaces the journal by a text."""

    def change(staging: Path, names: set[str], place: Path) -> None:
        del place
        for journal in journals(staging, names):
            journal.write_text(text)

    return change


def halved(staging: Path, names: set[str], place: Path) -> None:
    """Cut the journal in half."""
    del place
    for journal in journals(staging, names):
        os.truncate(journal, journal.stat().st_size // 2)


def mistyped(staging: Path, names: set[str], place: Path) -> None:
    """Make every number and list of the journal a text, and leave the rest."""
    del place

    def other(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: other(each) for key, each in value.items()}
        return value if isinstance(value, str) else "7"

    for journal in journals(staging, names):
        lines = [json.dumps(other(json.loads(line))) for line in journal.read_text().splitlines()]
        journal.write_text("\n".join(lines) + "\n")


def journals(staging: Path, names: set[str]) -> list[Path]:
    """Return the JSON that is no part of the output."""
    found = [file for file in staging.rglob("*.json*") if file.name not in names]
    assert found, sorted(staging.rglob("*"))
    return found


MALFORMED = {3}
TAMPERED = {
    "flipped": (flipped, REFUSED),
    "zeroed": (zeroed, REFUSED),
    "linked-file": (linked_file, REFUSED),
    "linked-folder": (linked_folder, REFUSED),
    "journal-open": (garbled("{"), MALFORMED),
    "journal-list": (garbled("[]"), MALFORMED),
    "journal-empty": (garbled(""), MALFORMED),
    "journal-binary": (garbled("\0" * 100), MALFORMED),
    "journal-halved": (halved, MALFORMED),
    "journal-mistyped": (mistyped, MALFORMED),
}

QUICK_ROWS = {"flipped", "linked-file", "journal-halved", "journal-mistyped"}


@pytest.mark.parametrize(
    ("tamper", "codes"),
    [
        pytest.param(*row, id=name, marks=whole_only(name in QUICK_ROWS))
        for name, row in TAMPERED.items()
    ],
)
@each([INTO_DIRECTORY, INTO_FILE], quick=[INTO_FILE])
def test_what_is_staged_is_not_trusted(
    command: Command,
    tamper: Callable[[Path, set[str], Path], None],
    codes: set[int],
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    reference, out = references.of(command), place / f"out{command.suffix}"
    words = [*command.words(inputs, out), "--resume"]
    staging = killed_late(words, references, command, out)
    (place / "victim").mkdir()
    tamper(staging, {*(reference.digest or ()), out.name}, place)
    victim = digest(place / "victim")
    resumed(counts, words, out, reference.digest, codes)
    if digest(place / "victim") != victim:
        counts.add("replaced", "what a link in the staging folder names")
    counts.settle()


@each([INTO_DIRECTORY, INTO_FILE], quick=[INTO_FILE])
def test_a_base_is_swapped_meanwhile(
    command: Command, inputs: Inputs, references: References, place: Path, counts: Counts
) -> None:
    """Other bytes under the same names, sizes and times."""
    out = place / f"out{command.suffix}"
    if command.suffix:
        file = shutil.copy2(inputs.q8, place / "swapped.gguf")
        instead = {"q8": file}
    else:
        instead = {"base": linked(inputs.base, place / "swapped")}
        file = own(shard_of(instead["base"], CHANGED))
    words = [*command.words(inputs, out, **instead), "--resume"]
    killed_late(words, references, command, out)
    times = file.stat()
    if command.suffix:
        with file.open("r+b") as opened:
            # The first value of a block of 34 bytes is its scale: the ones after are safe.
            opened.seek(-(34 * 1000) + 5, os.SEEK_END)
            opened.write(b"\x7f\x01\x7f")
    else:
        poke(instead["base"], CHANGED, 0.5)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    right = references.of(command, **instead).digest
    assert right != references.of(command).digest
    resumed(counts, words, out, right, REFUSED)
    counts.settle()


def killed_late(words: list[str], references: References, command: Command, out: Path) -> Path:
    """Kill a merge as late as it still has a staging folder with a journal; return that folder."""
    steps = references.steps(command)
    names = {*(references.of(command).digest or ()), out.name}
    latest = references.latest.get(command.name, len(steps) - 2)
    for step in range(latest, 0, -1):
        Run(words, fault=f"kill,SIGKILL,{step}", fired=out.with_name("fired")).finish()
        for name in hidden(out):
            folder = out.with_name(name)
            if out.exists():
                break  # it was complete already
            if folder.is_dir() and any(f.name not in names for f in folder.rglob("*.json*")):
                references.latest[command.name] = step
                return folder
        removed(out)
        for name in hidden(out):
            removed(out.with_name(name))
    pytest.fail(f"no staging folder with a journal at any of {len(steps)} steps")


def resumed(counts: Counts, words: list[str], out: Path, right: Digest, codes: set[int]) -> None:
    """Resume, which may refuse; begun anew, it comes to the same."""
    ended = Run(words).finish()
    if not judged(counts, ended, out, before=None, right=[right], codes=codes):
        said(counts, ended)
        removed(out)
        anew = Run([word for word in words if word != "--resume"]).finish()
        succeeded(counts, anew, out, right)
    counts.settle()
