"""What becomes of the whole file in an engine: the strongest effect of what was found."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from adapterkit.validation.findings import CoveredModule, Finding, Outcome, Severity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Verdict(StrEnum):
    """What an engine does with an adapter; refusals come before what happens later.

    `garbage` is loaded and computed with, and what comes out is chance, or the end of the process.
    """

    REFUSED = "refused"
    ABORTS = "aborts"
    GARBAGE = "garbage"
    NOTHING = "no effect"
    PARTLY = "partly applied"
    APPLIED = "applied"


_PASSED_OVER = {Outcome.IGNORED, Outcome.UNMATCHED}


def verdict(
    findings: Sequence[Finding],
    modules: Sequence[CoveredModule],
    effects: Mapping[str, Verdict],
    target: str,
) -> Verdict | None:
    """Return what becomes of the file; None where the engine's rules do not say.

    Args:
        findings: everything found, of any engine.
        modules: what the engine does with each module; empty if it was not looked at.
        effects: finding code -> what it leads to.
        target: name of the engine.
    """
    if not effects:
        return None
    mine = [effects[f.code] for f in findings if f.code in effects and f.target in {"", target}]
    if any(module.outcome is Outcome.REFUSED for module in modules) and not mine:
        return Verdict.REFUSED
    passed = sum(module.outcome in _PASSED_OVER for module in modules)
    if passed:
        mine.append(Verdict.NOTHING if passed == len(modules) else Verdict.PARTLY)
    fate = min(mine, key=list(Verdict).index, default=Verdict.APPLIED if modules else None)
    unchecked = any(f.severity is Severity.UNCHECKED and f.target in {"", target} for f in findings)
    # What was not looked at may still be refused; what is refused stays so.
    certain = fate in {Verdict.REFUSED, Verdict.ABORTS, Verdict.GARBAGE}
    return fate if certain or not unchecked else None
