"""Signals at random moments, and just before any step: the output is as before, or right."""

from __future__ import annotations

from random import Random
from signal import SIGINT, SIGKILL, SIGTERM
from typing import TYPE_CHECKING

import pytest

from soak.commands import (
    COMMANDS,
    CONVERT_DIRECTORY,
    CONVERT_FILE,
    EXTRACT,
    INTO_DIRECTORY,
    INTO_FILE,
    INTO_REAL,
    each,
    former,
)
from soak.judging import CODES, SIGNALS, judged, succeeded
from soak.runs import Run, digest, disturbed, hidden, removed, restored

if TYPE_CHECKING:
    from pathlib import Path

    from soak.commands import Command
    from soak.counts import Counts
    from soak.inputs import Inputs
    from soak.references import References
    from soak.scales import Scale

pytestmark = pytest.mark.slow

# Of the time at which it ends, what a moment near the end is drawn from; the rest is uniform.
_END, _AFTER, _SHARE = 0.85, 1.05, 0.25
# Steps at the end, half of the kills: the moves into place.
_LAST = 8
_AT_ONCE = 2.0


@each(COMMANDS)
def test_signalled_at_any_moment(
    command: Command,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    random = Random(command.name)  # noqa: S311  (the same on every machine)
    reference, out = references.of(command), place / f"out{command.suffix}"
    old = former(command, inputs, place)
    for number in range(scale.moments):
        signal = SIGKILL if not number else random.choice(SIGNALS[number % 2 :])
        near = random.random() < _SHARE
        after = random.uniform(_END, _AFTER) if near else random.random()
        copy = old if random.random() < 0.5 else None
        restored(out, copy)
        before, there = digest(out), hidden(out)
        words = command.words(inputs, out) + ["--force"] * (copy is not None)
        ended = disturbed(words, [signal], after * reference.seconds)
        judged(
            counts,
            ended,
            out,
            before=before,
            right=[reference.digest],
            codes=CODES[signal],
            hidden_before=None if signal is SIGKILL else there,
        )
    removed(out)
    succeeded(counts, Run(command.words(inputs, out)).finish(), out, reference.digest)
    counts.settle()


@each(COMMANDS, quick=[CONVERT_FILE, CONVERT_DIRECTORY, INTO_DIRECTORY, INTO_FILE])
def test_signalled_before_any_step(
    command: Command,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    random = Random(command.name)  # noqa: S311  (the same on every machine)
    reference, steps = references.of(command), len(references.steps(command))
    out, fired = place / f"out{command.suffix}", place / "fired"
    old = former(command, inputs, place)
    for number in range(scale.steps):
        step = (
            steps - random.randrange(min(_LAST, steps)) if number % 2 else random.randint(1, steps)
        )
        signal = SIGNALS[number % len(SIGNALS)]
        restored(out, old)
        before, there = digest(out), hidden(out)
        run = Run(
            [*command.words(inputs, out), "--force"],
            fault=f"kill,{signal.name},{step}",
            fired=fired,
        )
        judged(
            counts,
            run.finish(),
            out,
            before=before,
            right=[reference.digest],
            codes=CODES[signal],
            hidden_before=None if signal is SIGKILL else there,
        )
    removed(out)
    succeeded(counts, Run(command.words(inputs, out)).finish(), out, reference.digest)
    counts.settle()


@each([INTO_REAL, INTO_DIRECTORY, EXTRACT], quick=[INTO_REAL])
def test_a_second_signal_ends_it_at_once(
    command: Command,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    random = Random(command.name)  # noqa: S311  (the same on every machine)
    reference, out = references.of(command), place / f"out{command.suffix}"
    for number in range(max(1, scale.moments // 10)):
        signals = [SIGINT, SIGINT] if number % 2 == 0 else [SIGTERM, SIGINT]
        removed(out)
        after = random.uniform(0.2, 0.9) * reference.seconds
        ended = disturbed(command.words(inputs, out), signals, after)
        judged(
            counts,
            ended,
            out,
            before=None,
            right=[reference.digest],
            codes={130, 143, -SIGINT, -SIGTERM},
        )
        if ended.seconds > _AT_ONCE and not ended.hung:
            counts.add("hangs", f"not at once: {ended}")
    removed(out)
    succeeded(counts, Run(command.words(inputs, out)).finish(), out, reference.digest)
    counts.settle()


def test_an_adapter_is_replaced_as_a_pair(
    scale: Scale, inputs: Inputs, references: References, place: Path, counts: Counts
) -> None:
    """Config and weights of one adapter each, from the first step of a replacement to the last."""
    command = CONVERT_DIRECTORY
    new, old = references.of(command), references.of(command, adapter=inputs.other)
    steps, out = len(references.steps(command)), place / "out"
    chosen = range(1, steps + 1) if scale.kills >= steps else range(steps, steps - scale.kills, -1)
    for step in chosen:
        restored(out, old.path)
        run = Run(
            [*command.words(inputs, out), "--force"],
            fault=f"kill,SIGKILL,{step}",
            fired=place / "fired",
        )
        judged(
            counts,
            run.finish(),
            out,
            before=old.digest,
            right=[new.digest],
            codes={-9},
        )
    restored(out, old.path)
    again = Run([*command.words(inputs, out), "--force"]).finish()
    succeeded(counts, again, out, new.digest)
    counts.settle()
