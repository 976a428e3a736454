"""What becomes of the whole file in an engine: the strongest effect of what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.checks.findings import CoveredModule, Finding, Outcome, Severity, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adapterkit.engines.engine import Target


# What an engine does not load; nothing of the adapter is applied then.
STOPPED = {Verdict.REFUSED, Verdict.ABORTS}
_ENDED = {*STOPPED, Verdict.GARBAGE}
# What is another model than the adapter's.
FAILED = {*STOPPED, Verdict.GARBAGE, Verdict.NOTHING, Verdict.ALTERED}
# A loader that goes by names needs no base to decide.
_NO_BASE = "AK300"
_PASSED_OVER = {Outcome.IGNORED, Outcome.UNMATCHED}


def verdict(
    findings: Sequence[Finding], modules: Sequence[CoveredModule], engine: Target
) -> Verdict | None:
    """Return what becomes of the file; None where something could not be looked at.

    Args:
        findings: everything found, of any engine.
        modules: what the engine does with each module; empty if it was not looked at.
        engine: the engine.
    """
    mine = [fate for _, fate in _fates(findings, engine)]
    refused = any(module.outcome is Outcome.REFUSED for module in modules)
    # What is found of a refused module may know better: the engine aborts, or computes with it.
    if refused and not _ENDED & set(mine):
        return Verdict.REFUSED
    passed = sum(module.outcome in _PASSED_OVER for module in modules)
    if passed:
        mine.append(Verdict.NOTHING if passed == len(modules) else Verdict.PARTLY)
    fate = min(mine, key=list(Verdict).index, default=Verdict.APPLIED if modules else None)
    unchecked = any(
        f.severity is Severity.UNCHECKED and f.engine in {"", engine.name}
        for f in findings
        if f.code != _NO_BASE or engine.coverage != "names"
    )
    # What was not looked at may still be refused; what is refused stays so.
    certain = fate in _ENDED
    return fate if certain or not unchecked else None


def deciding(findings: Iterable[Finding], engine: Target) -> Finding | None:
    """Return the finding for which the engine does not load the file; None if it does."""
    stops = (finding for finding, fate in _fates(findings, engine) if fate in STOPPED)
    return next(stops, None)


def _fates(findings: Iterable[Finding], engine: Target) -> list[tuple[Finding, Verdict]]:
    return [
        (finding, fate)
        for finding in findings
        if finding.engine in {"", engine.name} and (fate := engine.fate(finding))
    ]
