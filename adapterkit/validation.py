"""Will it work? An adapter checked alone, against its base, and against the engine it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit.checks.adapter import check
from adapterkit.checks.findings import Finding, Severity, gathered
from adapterkit.checks.reading import read_for_validation
from adapterkit.checks.security import check_security
from adapterkit.engines.engine import load_target
from adapterkit.engines.judgement import EngineCoverage, judge
from adapterkit.loading import open_model, recognise


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
    engines = [load_target(reference) for reference in targets]
    place = recognise(source, dialect=dialect, as_format=as_format)
    adapter, known, found = read_for_validation(
        place, base=open_model(base), dialect=dialect, alpha=alpha
    )
    found += check_security(place.path)
    if adapter is not None:
        found += check(adapter, known, values=values)
    every = list(found)
    coverage: list[EngineCoverage] = []
    for engine in engines:
        covered, more = judge(adapter, known, engine, found)
        every += more
        coverage.append(covered)
    order = list(Severity)
    ordered = sorted(gathered(every), key=lambda finding: order.index(finding.severity))
    return ValidationReport(
        path=str(place.path),
        format=place.format.name,
        base=str(known.path) if known else None,
        findings=tuple(ordered),
        coverage=tuple(coverage),
    )
