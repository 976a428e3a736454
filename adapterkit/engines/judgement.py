"""What an engine makes of an adapter: of every module, and of the file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.checks.adapter import check
from adapterkit.checks.findings import (
    CoveredModule,
    Finding,
    Outcome,
    Severity,
    Verdict,
    advised,
)
from adapterkit.checks.gguf_file import check_gguf_file
from adapterkit.engines.coverage import cover, unserved
from adapterkit.engines.facts import facts
from adapterkit.engines.verdict import FAILED, STOPPED, deciding, verdict
from adapterkit.errors import UnsupportedError
from adapterkit.model.losses import lost_tensors, tensors_of
from adapterkit.notes import first_and_more

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.engines.engine import Target
    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCoverage:
    """What one engine does with every module.

    Attributes:
        engine: its name.
        version: the version asked for; empty for the newest that the rules know.
        modules: one entry for each pair; empty if no base is known.
        verdict: what becomes of the file as a whole; None where something could not be looked at.
    """

    engine: str
    version: str
    modules: tuple[CoveredModule, ...]
    verdict: Verdict | None = None

    @property
    def reference(self) -> str:
        """The engine as it was asked for: `name` or `name@version`."""
        return self.engine + (f"@{self.version}" if self.version else "")

    @property
    def coverage(self) -> dict[str, tuple[str, ...]]:
        """The modules by outcome; an outcome that none has is empty."""
        return {
            str(outcome): tuple(m.module for m in self.modules if m.outcome is outcome)
            for outcome in Outcome
        }

    def count(self, outcome: Outcome) -> int:
        """Return how many modules end that way."""
        return sum(module.outcome is outcome for module in self.modules)


def judge(
    adapter: AdapterTensorSet | None,
    base: BaseModel | None,
    engine: Target,
    found: Sequence[Finding] = (),
) -> tuple[EngineCoverage, list[Finding]]:
    """Return what an engine does with an adapter, and the findings that say why.

    What the verdict says of the file holds for every module: nothing of an adapter that the engine
    refuses is applied.

    Args:
        adapter: broken or not; None if its file cannot be read at all.
        base: its base model; None if it is unknown.
        engine: the engine.
        found: what is wrong with the adapter in any engine, from `check`.
    """
    modules: list[CoveredModule] = []
    of_engine: list[Finding] = []
    idle: list[Finding] = []
    if adapter is not None:
        modules, more = cover(adapter, base, engine)
        known = facts(adapter, base, engine.models)
        of_engine = [*engine.findings(known), *more]
        errors = [e for e in (*found, *of_engine) if e.severity is Severity.ERROR]
        idle = unserved(modules, engine, errors)
        if decided := engine.outcome(known):
            outcome, reason = decided
            modules = [replace(module, outcome=outcome, reason=reason) for module in modules]
    fate = verdict([*found, *of_engine], modules, engine)
    if fate in STOPPED:
        decisive = deciding([*found, *of_engine], engine)
        refused = (module.reason for module in modules if module.outcome is Outcome.REFUSED)
        reason = decisive.message if decisive else next(refused, "")
        modules = [
            replace(module, outcome=Outcome.REFUSED, reason=reason)
            if module.outcome is Outcome.APPLIED
            else module
            for module in modules
        ]
    judged = EngineCoverage(
        engine=engine.name, version=engine.version, modules=tuple(modules), verdict=fate
    )
    return judged, [*of_engine, *idle]


def check_served(
    adapter: AdapterTensorSet, base: BaseModel | None, engine: Target, *, path: Path
) -> list[str]:
    """Return what the engine leaves out of an adapter, one sentence each; values are looked at.

    Empty if the engine applies all of it, or that could not be looked at.

    Raises:
        UnsupportedError: if the engine would not run it as it is; says why and what to do.
    """
    found = check(adapter, base)
    read = adapter.provenance
    if read and read.format == "gguf":
        found += check_gguf_file(read.path)
    coverage, more = judge(adapter, base, engine, found)
    errors = [
        each
        for each in advised((*found, *more), adapter, base)
        if each.severity is Severity.ERROR and each.engine in {"", engine.name}
    ]
    # What is not looked at, for want of a base, makes nothing of this right.
    if coverage.verdict in FAILED or any(engine.fate(each) in FAILED for each in errors):
        reasons = first_and_more(
            [f"{e.message}; {e.hint}" if e.hint else e.message for e in errors]
        )
        raise UnsupportedError(f"{engine.title} would not run it as it is: {reasons}", path=path)
    return [each.message for each in errors] if coverage.verdict is Verdict.PARTLY else []


def passed_over(
    adapter: AdapterTensorSet, base: BaseModel | None, engine: Target
) -> Iterator[Loss]:
    """Yield what an engine does not apply of an adapter that it applies in part, by the reason.

    Nothing is yielded where it refuses a module or applies none: that is for `check_served` to say.
    What has no place in the engine's format is for the format to say.
    """
    if engine.coverage == "names":
        return  # which goes by how the file spells them
    modules, _ = cover(adapter, base, engine)
    found = {module.outcome for module in modules}
    if Outcome.REFUSED in found or Outcome.APPLIED not in found:
        return
    reasons: dict[str, list[str]] = {}
    for module in modules:
        if module.outcome is Outcome.IGNORED:
            reasons.setdefault(module.reason, []).append(module.module)
    for reason, names in reasons.items():
        yield lost_tensors("passed-over", tensors_of(adapter, names), reason)
