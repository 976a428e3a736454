"""Will it work? An adapter checked alone, against its base, and against the engine it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from adapterkit.attempts import Attempt
from adapterkit.base import BaseModel
from adapterkit.checks.adapter import check
from adapterkit.checks.findings import Finding, Severity, advised, gathered, known_code
from adapterkit.checks.reading import read_for_validation
from adapterkit.checks.security import check_security
from adapterkit.engines.engine import load_target
from adapterkit.engines.judgement import EngineCoverage, judge
from adapterkit.errors import UsageError
from adapterkit.loading import Source, open_model, recognise
from adapterkit.model import AdapterTensorSet
from adapterkit.page import Cell, page, shown, table
from adapterkit.several import each_of
from adapterkit.text import PLAIN, Pen, Shown, printable
from adapterkit.text import count as counted
from adapterkit.work import watchable

# What a gate may fail on -> the severities that do.
_FAILING = {
    "error": {Severity.ERROR},
    "warning": {Severity.ERROR, Severity.WARNING},
}


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ValidationReport(Shown):
    """Everything that was found.

    Attributes:
        source: what was read; None for an adapter in memory.
        format: its format.
        base: the base model that it was held against, None if none was known.
        findings: errors first.
        targets: one entry for each engine asked for.
    """

    _entries: ClassVar[str] = "findings"
    _before: ClassVar[tuple[str, ...]] = ("source",)

    source: str | None
    format: str | None
    base: str | None
    findings: tuple[Finding, ...]
    targets: tuple[EngineCoverage, ...]

    @property
    def exit_code(self) -> int:
        """1 for an error, 5 where something could not be checked, else 0."""
        return self.code()

    def code(self, fail_on: str = "error") -> int:
        """Return the exit code of a gate: 1 for an error, or for a warning where that fails too.

        Raises:
            UsageError: if `fail_on` is neither `error` nor `warning`.
        """
        if fail_on not in _FAILING:
            raise UsageError(f"nothing fails on {fail_on!r}; known: {', '.join(_FAILING)}")
        severities = {finding.severity for finding in self.findings}
        if severities & _FAILING[fail_on]:
            return 1
        return 5 if Severity.UNCHECKED in severities else 0

    def count(self, severity: str) -> int:
        """Return how many findings are of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def counts(self) -> str:
        """How many findings there are of each severity, in words."""
        found = [(kind, self.count(kind)) for kind in ("error", "unchecked", "warning")]
        said = (f"{n} unchecked" if k == "unchecked" else counted(n, k) for k, n in found if n)
        return ", ".join(said) or "nothing found"

    def lines(self, pen: Pen = PLAIN) -> list[str]:
        """Return what each engine does with it, and every finding with what to do."""
        told = [_coverage(engine) for engine in self.targets if engine.modules or engine.verdict]
        for finding in self.findings:
            if not (pen.brief and finding.severity is Severity.NOTE):
                told += _lines(finding, pen)
        return told

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what was found, and the counts."""
        return "\n".join([*self.lines(pen), self.counts])


def _coverage(engine: EngineCoverage) -> str:
    outcomes = list(dict.fromkeys(module.outcome for module in engine.modules))
    every = counted(len(engine.modules), "module")
    modules = f"of {every} " + ", ".join(f"{engine.count(each)} {each}" for each in outcomes)
    if len(outcomes) == 1:
        modules = f"{'all ' if len(engine.modules) > 1 else ''}{every} {outcomes[0]}"
    return f"{engine.reference}: " + "; ".join(
        filter(None, (f"{engine.verdict or ''}", modules if outcomes else ""))
    )


def _lines(finding: Finding, pen: Pen) -> list[str]:
    names = ", ".join(finding.modules) if pen.whole else finding.where
    engine = f" [{finding.engine}]" if finding.engine else ""
    head = pen.severity(f"{finding.severity} {finding.code}")
    line = head + printable(f"{engine} {f'{names}: ' if names else ''}{finding.message}")
    return [line, f"  {printable(finding.hint)}"] if finding.hint else [line]


@watchable
def validate(
    source: AdapterTensorSet | Path | str,
    *,
    base: BaseModel | Path | str | None = None,
    targets: Sequence[str] = (),
    values: bool = True,
    ignore: Sequence[str] = (),
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """Check an adapter file alone, against a base and against engines.

    Args:
        source: adapter of any format that is read, or one in memory.
        base: Hugging Face directory, config.json, GGUF file or cached hub id; by default the model
            that the adapter names, if it is in the local hub cache.
        targets: engines, each `name` or `name@version`.
        values: whether to read the tensors; without, only headers are looked at.
        ignore: codes whose findings are left out; what an engine does stays as it is.
        dialect: key grammar of a hand-written adapter, where the file cannot tell.
        alpha: scale numerator, where the file does not hold it.
        as_format: name of the format to read it as, where its content does not tell.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        FormatError: if the source or the base cannot be read at all.
        UsageError: if an engine or a code is unknown.
    """
    del progress  # told by `watchable`
    engines = [load_target(reference) for reference in each_of(targets)]
    ignored = {known_code(code) for code in each_of(ignore)}
    place = (
        source
        if isinstance(source, AdapterTensorSet)
        else recognise(source, dialect=dialect, as_format=as_format)
    )
    adapter, known, found = read_for_validation(
        place, base=open_model(base), dialect=dialect, alpha=alpha
    )
    if isinstance(place, Source):
        found += check_security(place.path, readable=adapter is not None)
    if adapter is not None:
        found += check(adapter, known, values=values)
    every = list(found)
    judged: list[EngineCoverage] = []
    for engine in engines:
        covered, more = judge(adapter, known, engine, found)
        every += more
        judged.append(covered)
    order = list(Severity)
    kept = (
        finding
        for finding in gathered(advised(every, adapter, known))
        if finding.code not in ignored
    )
    return ValidationReport(
        source=str(place.path) if isinstance(place, Source) else None,
        format=place.format.name if isinstance(place, Source) else None,
        base=str(known.path) if known else None,
        findings=tuple(sorted(kept, key=lambda finding: order.index(finding.severity))),
        targets=tuple(judged),
    )


def validation_page(attempts: Sequence[Attempt[ValidationReport]]) -> str:
    """Return what was found in any number of adapters as one self-contained HTML page.

    Args:
        attempts: what `for_each(validate, ...)` gave.
    """
    engines = list(
        dict.fromkeys(e.reference for a in attempts if a.result for e in a.result.targets)
    )
    rows = [_overview(attempt, engines) for attempt in attempts]
    header = ("adapter", "format", "errors", "warnings", "unchecked", *engines)
    details = "".join(map(_details, attempts))
    title = f"Validation of {counted(len(attempts), 'adapter')}"
    return page(title, f"<h1>{title}</h1>{table(header, rows)}{details}")


def _overview(attempt: Attempt[ValidationReport], engines: Sequence[str]) -> tuple[Cell, ...]:
    report = attempt.result
    if report is None:
        return (attempt.source, "unreadable", *(("", None),) * 3, *("",) * len(engines))
    verdicts = {engine.reference: str(engine.verdict or "unchecked") for engine in report.targets}
    kinds = (report.count(kind) for kind in ("error", "warning", "unchecked"))
    return (
        attempt.source,
        report.format or "",
        *((str(number), float(number)) for number in kinds),
        *(verdicts.get(engine, "") for engine in engines),
    )


_MARKS = {Severity.ERROR: "", Severity.NOTE: "good"}


def _details(attempt: Attempt[ValidationReport]) -> str:
    head = f"<h2>{shown(attempt.source)}</h2>"
    if attempt.result is None:
        return f'{head}<ul class="health"><li>{shown(attempt.message)}</li></ul>'
    lines = "".join(
        f'<li class="{_MARKS.get(finding.severity, "look")}">'
        + "<br>".join(map(shown, _lines(finding, PLAIN)))
        + "</li>"
        for finding in attempt.result.findings
    )
    engines = "".join(
        f"<li>{shown(_coverage(engine))}</li>"
        for engine in attempt.result.targets
        if engine.modules or engine.verdict
    )
    fine = '<li class="good">nothing found</li>'
    return f'{head}<ul>{engines}</ul><ul class="health">{lines or fine}</ul>'
