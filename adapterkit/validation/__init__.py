"""Will it work? An adapter checked alone, against its base, and against the engine it is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.loading import open_model, recognise
from adapterkit.validation.coverage import cover, silent_no_ops
from adapterkit.validation.engines import load_target, target_names
from adapterkit.validation.facts import facts
from adapterkit.validation.findings import (
    CoveredModule,
    Explanation,
    Finding,
    Outcome,
    Severity,
    explanations,
)
from adapterkit.validation.fitting import check_fit
from adapterkit.validation.reading import read_for_validation
from adapterkit.validation.security import check_security
from adapterkit.validation.structure import check_structure
from adapterkit.validation.values import check_values
from adapterkit.validation.verdict import Verdict, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet
    from adapterkit.validation.engines import Target

__all__ = [
    "CoveredModule",
    "EngineCoverage",
    "Explanation",
    "Finding",
    "Outcome",
    "Severity",
    "ValidationReport",
    "Verdict",
    "check",
    "explanations",
    "load_target",
    "target_names",
    "validate",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCoverage:
    """What one engine does with every module.

    Attributes:
        target: the engine, `name` or `name@version`.
        modules: one entry for each pair; empty if no base is known.
        verdict: what becomes of the file as a whole; None where the rules do not tell.
    """

    target: str
    modules: tuple[CoveredModule, ...]
    verdict: Verdict | None = None

    def count(self, outcome: Outcome) -> int:
        """Return how many modules end that way."""
        return sum(module.outcome is outcome for module in self.modules)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationReport:
    """Everything that was found.

    Attributes:
        path: what was read.
        format: its format.
        base: the base model that it was held against, None if none was known.
        findings: errors first.
        coverage: one entry for each engine asked for.
    """

    path: str
    format: str
    base: str | None
    findings: tuple[Finding, ...]
    coverage: tuple[EngineCoverage, ...]

    @property
    def exit_code(self) -> int:
        """1 for an error, 5 where something could not be checked, else 0."""
        severities = {finding.severity for finding in self.findings}
        if Severity.ERROR in severities:
            return 1
        return 5 if Severity.UNCHECKED in severities else 0


def validate(
    source: Path | str,
    *,
    base: Path | str | None = None,
    targets: Sequence[str] = (),
    values: bool = True,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
) -> ValidationReport:
    """Check an adapter file alone, against a base and against engines.

    Args:
        source: adapter of any format that is read.
        base: Hugging Face directory, config.json, GGUF file or cached hub id; by default the model
            that the adapter names, if it is in the local hub cache.
        targets: engines, each `name` or `name@version`.
        values: whether to read the tensors; without, only headers are looked at.
        dialect: key grammar of a hand-written adapter, where the file cannot tell.
        alpha: scale numerator, where the file does not hold it.
        as_format: name of the format to read it as, where its content does not tell.

    Raises:
        FormatError: if the source or the base cannot be read at all.
        UsageError: if an engine is unknown.
    """
    engines = [(reference, load_target(reference)) for reference in targets]
    place = recognise(source, dialect=dialect, as_format=as_format)
    adapter, known, found = read_for_validation(
        place, base=open_model(base), dialect=dialect, alpha=alpha
    )
    found += check_security(place.path)
    if adapter is not None:
        found += check(adapter, known, values=values)
    coverage: list[EngineCoverage] = []
    for reference, engine in engines:
        modules, more = _on_engine(adapter, known, engine)
        found += more
        fate = verdict(found, modules, engine.effects, engine.name)
        coverage.append(EngineCoverage(target=reference, modules=tuple(modules), verdict=fate))
    order = list(Severity)
    unique = dict.fromkeys(sorted(found, key=lambda finding: order.index(finding.severity)))
    return ValidationReport(
        path=str(place.path),
        format=place.format.name,
        base=str(known.path) if known else None,
        findings=tuple(unique),
        coverage=tuple(coverage),
    )


def _on_engine(
    adapter: AdapterTensorSet | None, base: BaseModel | None, engine: Target
) -> tuple[list[CoveredModule], list[Finding]]:
    if adapter is None:
        return [], []
    modules, found = cover(adapter, base, engine)
    known = facts(adapter, base)
    found = [*engine.findings(known), *found, *silent_no_ops(modules, engine)]
    if decided := engine.outcome(known):
        outcome, reason = decided
        modules = [replace(module, outcome=outcome, reason=reason) for module in modules]
    return modules, found


def check(
    adapter: AdapterTensorSet, base: BaseModel | None, *, values: bool = True
) -> list[Finding]:
    """Return the findings about an adapter in memory, alone and on a base."""
    found = list(check_structure(adapter))
    if values:
        found += check_values(adapter)
    return [*found, *check_fit(adapter, base)]
