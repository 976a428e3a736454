"""The one rule of all tests: what is at the destination is as before, or right."""

from __future__ import annotations

from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM
from typing import TYPE_CHECKING

from soak.runs import difference, digest, hidden, lock_name

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from soak.counts import Counts
    from soak.runs import Digest, Ended

SIGNALS = (SIGKILL, SIGINT, SIGTERM, SIGHUP)
CODES = {SIGKILL: {-9}, SIGINT: {130}, SIGTERM: {143}, SIGHUP: {129}}
FULL = {1}
REFUSED = {1, 2, 3, 4}


def judged(
    counts: Counts,
    ended: Ended,
    out: Path,
    *,
    before: Digest,
    right: Sequence[Digest],
    codes: Collection[int],
    hidden_before: Collection[str] | None = None,
    trace: bool = False,
) -> bool:
    """Count what a run did wrong; return whether the destination is complete.

    Args:
        counts: of the test.
        ended: the run.
        out: its destination.
        before: what was there.
        right: what undisturbed runs write there.
        codes: exit codes of a run that did not come to its end.
        hidden_before: what was hidden beside the destination; None if the run may leave something.
        trace: whether a traceback is in order, as it is for a bug.
    """
    found = digest(out)
    whole = found in right
    counts.ran(ended, {*codes, 0, -2, -15, -1} if whole else {*codes, 0}, trace=trace)
    if ended.code == 0 and not whole and not ended.hung:
        counts.add("wrong", f"success, but {difference(found, right[0])}: {ended}")
    elif not whole and found != before:
        kind = "wrong" if found is None or before is None else "replaced"
        counts.add(kind, f"neither old nor new; {difference(found, right[0])}: {ended}")
    if hidden_before is not None and not ended.hung:
        left = hidden(out) - set(hidden_before) - ({lock_name(out)} if ended.code == -9 else set())
        if left:
            counts.add("left", f"{sorted(left)}: {ended}")
    return whole


def succeeded(counts: Counts, ended: Ended, out: Path, right: Digest) -> None:
    """Count what is wrong with a run that nothing disturbed and that others came before."""
    counts.ran(ended, {0})
    found = digest(out)
    if found != right:
        counts.add("wrong", f"undisturbed, but {difference(found, right)}: {ended}")
    if hidden(out):
        counts.add("left", f"after a success: {sorted(hidden(out))}")


def said(counts: Counts, ended: Ended, names: str = "") -> None:
    """Count a failed run that does not end with one message, of one line, that names something."""
    if ended.hung or ended.code == 0:
        return
    messages = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    if len(messages) != 1 or names not in messages[0]:
        counts.add("messages", f"expected one about {names or 'it'}: {ended}")
