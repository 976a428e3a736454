"""Several processes and one destination: one of them writes it, and it is that one's."""

from __future__ import annotations

import re
from random import Random
from typing import TYPE_CHECKING

import pytest

from soak.commands import CONVERT_DIRECTORY, INTO_FILE, RACED, Command, each
from soak.runs import Run, difference, digest, hidden, removed

if TYPE_CHECKING:
    from pathlib import Path

    from soak.counts import Counts
    from soak.inputs import Inputs
    from soak.references import Reference, References
    from soak.runs import Digest, Ended
    from soak.scales import Scale

pytestmark = pytest.mark.slow

# Where all wait for the others.
MEETINGS = ("start", "os.fsync", "os.rename", "os.mkdir", "os.link")
_REFUSED = re.compile(r"exist|held|hold|another|process|lock", re.IGNORECASE)


@each(RACED)
def test_one_of_several_wins(
    command: Command,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    random = Random(command.name)  # noqa: S311  (the same on every machine)
    right, out = both(references, command, inputs), place / f"out{command.suffix}"
    for number in range(scale.rounds):
        removed(out)
        ended = race(command, inputs, out, random, number, force=False)
        winners = [index for index, one in enumerate(ended) if one.code == 0]
        told = "; ".join(map(str, ended))
        for one in ended:
            counts.ran(one, {0, 1})
            if one.code == 1 and not _REFUSED.search(one.stderr):
                counts.add("messages", f"expected who was first: {one}")
        if len(winners) > 1:
            counts.add("replaced", f"{len(winners)} won: {told}")
        elif not winners:
            counts.add("codes", f"nobody won: {told}")
        check(counts, out, [right[index % 2].digest for index in winners] or [None], told)
    counts.settle()


@each(RACED, quick=[CONVERT_DIRECTORY, INTO_FILE])
def test_with_force_the_last_wins(
    command: Command,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    random = Random(command.name)  # noqa: S311  (the same on every machine)
    right, out = both(references, command, inputs), place / f"out{command.suffix}"
    for number in range(scale.rounds):
        ended = race(command, inputs, out, random, number, force=True)
        told = "; ".join(map(str, ended))
        for one in ended:
            counts.ran(one, {0, 1})
            if one.code == 1 and not _REFUSED.search(one.stderr):
                counts.add("messages", f"expected who was first: {one}")
        if all(one.code for one in ended):  # whoever holds it refuses others, but is done itself
            counts.add("codes", f"nobody won: {told}")
        check(counts, out, [reference.digest for reference in right], told)
    counts.settle()


def both(references: References, command: Command, inputs: Inputs) -> list[Reference]:
    """Return what racers of even and of odd number write, which differs."""
    right = [references.of(command), references.of(command, adapter=inputs.other)]
    assert right[0].digest != right[1].digest
    return right


def race(
    command: Command,
    inputs: Inputs,
    out: Path,
    random: Random,
    number: int,
    *,
    force: bool,
) -> list[Ended]:
    """Start two to four at once, and hold them at a meeting place until all are there."""
    racers = random.choice((2, 3, 4)) if number > 2 else 2
    meeting = out.parent / f"meeting-{number}-{force}"
    meeting.mkdir()
    fault = f"barrier,{meeting},{racers},{MEETINGS[number % len(MEETINGS)]}"
    words = [
        [*command.words(inputs, out, adapter=adapter), *(["--force"] if force else [])]
        for adapter in (inputs.adapter, inputs.other)
    ]
    runs = [Run(words[index % 2], fault=fault, fired=meeting) for index in range(racers)]
    return [run.finish() for run in runs]


def check(counts: Counts, out: Path, right: list[Digest], told: str) -> None:
    """Count a destination that is nobody's, and what is left beside it."""
    found = digest(out)
    if found not in right:
        counts.add("wrong", f"{difference(found, right[0])}: {told}")
    if hidden(out):
        counts.add("left", f"{sorted(hidden(out))}: {told}")
