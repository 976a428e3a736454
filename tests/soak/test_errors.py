"""An error at any step arrives as a message, and leaves what was there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from soak.commands import (
    CONVERT_DIRECTORY,
    CONVERT_FILE,
    INTO_DIRECTORY,
    INTO_FILE,
    INTO_MIXTURE,
    INTO_REAL,
    Command,
    each,
    former,
    whole_only,
)
from soak.inputs import CHANGED, linked, own, poke, shard_of
from soak.judging import FULL, judged, said
from soak.runs import Run, digest, hidden, restored

if TYPE_CHECKING:
    from pathlib import Path

    from soak.counts import Counts
    from soak.inputs import Inputs
    from soak.references import References
    from soak.scales import Scale

pytestmark = pytest.mark.slow

BAD = {3, 4}
RAISED = {7}  # what the driver ends with when the callback's own error has come back


@dataclass(frozen=True, slots=True)
class Case:
    """Something that goes wrong.

    Attributes:
        command: in what.
        fault: of the driver.
        codes: with which the program may end.
        bug: whether it is an error that nobody can expect, which keeps its traceback.
        more: options.
    """

    command: Command
    fault: str | None
    codes: set[int]
    bug: bool = False
    more: tuple[str, ...] = ()


CASES = {
    "memory-in-worker": Case(INTO_REAL, "fail,numpy.matmul,MemoryError,3", {1, 4, 5}, bug=True),
    "bug-in-worker": Case(INTO_DIRECTORY, "fail,numpy.matmul,RuntimeError,3", {1}, bug=True),
    "bug-in-mixture": Case(INTO_MIXTURE, "fail,numpy.matmul,RuntimeError,1", {1}, bug=True),
    "interrupt-in-worker": Case(INTO_REAL, "fail,numpy.matmul,KeyboardInterrupt,3", {1, 130}),
    "pwrite-full": Case(INTO_REAL, "fail,os.pwrite,ENOSPC,5", FULL),
    "pwrite-full-in-directory": Case(INTO_DIRECTORY, "fail,os.pwrite,ENOSPC,9", FULL),
    "pwrite-quota-in-mixture": Case(INTO_MIXTURE, "fail,os.pwrite,EDQUOT,2", FULL),
    "fallocate-full": Case(INTO_DIRECTORY, "fail,os.posix_fallocate,ENOSPC,2", FULL),
    "copy-fails": Case(INTO_FILE, "fail,os.copy_file_range,EIO,2", FULL),
    "flush-full": Case(INTO_FILE, "fail,os.fsync,ENOSPC,1", FULL),
    "second-flush-fails": Case(INTO_DIRECTORY, "fail,os.fsync,EIO,2", FULL),
    "third-flush-fails": Case(INTO_REAL, "fail,os.fsync,EIO,3", FULL),
    "bug-in-flush": Case(INTO_REAL, "fail,os.fsync,RuntimeError,2", {1}, bug=True),
    "convert-flush-full": Case(CONVERT_FILE, "fail,os.fsync,ENOSPC,1", FULL),
    "convert-directory-flush-full": Case(CONVERT_DIRECTORY, "fail,os.fsync,ENOSPC,2", FULL),
    "progress-raises": Case(INTO_REAL, "progress,ValueError", RAISED),
    "progress-raises-in-directory": Case(INTO_DIRECTORY, "progress,ValueError", RAISED),
    "progress-interrupts": Case(INTO_FILE, "progress,KeyboardInterrupt", RAISED),
    "weight-too-large": Case(INTO_REAL, None, BAD, more=("--weights", "1e30")),
    "weight-too-large-for-mixture": Case(INTO_MIXTURE, None, BAD, more=("--weights", "1e30")),
    "weight-too-large-for-f16": Case(
        INTO_DIRECTORY, None, BAD, more=("--weights", "1e30", "--dtype", "f16")
    ),
}


QUICK_ROWS = {
    "memory-in-worker",
    "bug-in-mixture",
    "pwrite-full",
    "fallocate-full",
    "second-flush-fails",
    "convert-directory-flush-full",
    "progress-raises",
    "interrupt-in-worker",
    "weight-too-large",
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=whole_only(name in QUICK_ROWS))
        for name, case in CASES.items()
    ],
)
def test_an_error_is_a_message(
    case: Case, scale: Scale, inputs: Inputs, references: References, place: Path, counts: Counts
) -> None:
    check(case, scale, inputs, references, place, counts)


@pytest.mark.parametrize(
    "value", [float("nan"), 1e6, pytest.param(float("inf"), marks=whole_only(quick=False))]
)
def test_a_value_of_the_base(
    value: float,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    """One NaN among millions, or one number that float16 does not have."""
    base = linked(inputs.base, place / "base")
    poke(base, CHANGED, value)
    large = abs(value) < float("inf")
    more = ("--dtype", "f16") if large else ()
    case = Case(INTO_DIRECTORY, None, {4} if large else {3}, more=more)
    check(case, scale, inputs, references, place, counts, names="q_proj", base=base)


@each([INTO_DIRECTORY, INTO_FILE], quick=[INTO_DIRECTORY])
def test_a_source_is_cut_meanwhile(
    command: Command,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
) -> None:
    if command.suffix:
        file = shutil.copy(inputs.q8, place / "base.gguf")
        instead = {"q8": file}
    else:
        instead = {"base": linked(inputs.base, place / "base")}
        file = own(shard_of(instead["base"], CHANGED))
    case = Case(command, f"truncate,{file},2", {3})
    check(case, scale, inputs, references, place, counts, names=file.name, **instead)


def check(
    case: Case,
    scale: Scale,
    inputs: Inputs,
    references: References,
    place: Path,
    counts: Counts,
    names: str = "",
    **instead: Path,
) -> None:
    """Run, over nothing and (in the whole) over an older output."""
    command = case.command
    reference = references.of(command)
    out, fired = place / f"out{command.suffix}", place / "fired"
    old = former(command, inputs, place)
    for copy in [None, old] if scale.repeated else [None]:
        if copy is not None and case.fault and case.fault.startswith(("progress", "truncate")):
            continue
        restored(out, copy)
        fired.unlink(missing_ok=True)
        before, there = digest(out), hidden(out)
        words = [*command.words(inputs, out, **instead), *case.more]
        words += ["--force"] * (copy is not None)
        ended = Run(words, fault=case.fault, fired=fired).finish()
        judged(
            counts,
            ended,
            out,
            before=before,
            right=[reference.digest],
            codes=case.codes,
            hidden_before=there,
            trace=case.bug,
        )
        assert case.fault is None or fired.exists(), f"{case.fault} did not happen: {ended}"
        if not case.bug and case.codes != RAISED:
            said(counts, ended, names)
    counts.settle()
