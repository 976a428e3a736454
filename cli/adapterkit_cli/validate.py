"""`adapterkit validate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit_cli import options, rendering, sarif

if TYPE_CHECKING:
    from adapterkit import EngineCoverage, Finding, ValidationReport


@click.command("validate")
@click.argument("source", metavar="SRC", type=options.PATH, required=False)
@options.reading
@click.option(
    "--target",
    "targets",
    metavar="ENGINE[@VERSION]",
    multiple=True,
    shell_complete=options.engine_names,
    help="Engine that it is for, one of `adapterkit targets`; may be repeated.",
)
@click.option("--explain", metavar="CODE", help="Say what a code means and what to do, and stop.")
@click.option("--sarif", "as_sarif", is_flag=True, help="Print SARIF 2.1.0, for code scanning.")
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    source: str | None,
    base: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    targets: tuple[str, ...],
    explain: str | None,
    *,
    as_sarif: bool,
    as_json: bool,
) -> None:
    """Say whether an adapter works: on a base, in an engine.

    Exit code 1 for errors, 5 where something could not be checked, else 0.
    """
    if explain:
        rendering.emit(_explained(explain))
        return
    if source is None:
        raise click.UsageError("SRC is missing; name an adapter, or a code with --explain")
    from adapterkit import validate

    report = validate(
        source, base=base, targets=targets, dialect=dialect, alpha=alpha, as_format=as_format
    )
    if as_sarif:
        rendering.emit(sarif.document(report))
    elif as_json:
        rendering.emit_json(_json(report))
    else:
        rendering.emit(_text(report))
    ctx.exit(report.exit_code)


def _explained(code: str) -> str:
    from adapterkit import explanations
    from adapterkit.errors import UsageError

    known = explanations()
    if code.upper() not in known:
        raise UsageError(f"unknown code {code!r}; known: {', '.join(known)}")
    found = known[code.upper()]
    return "\n".join(
        [f"{found.code}: {found.title}", found.meaning, found.matters, f"do: {found.action}"]
    )


def _json(report: ValidationReport) -> dict[str, object]:
    return {
        "path": report.path,
        "format": report.format,
        "base": report.base,
        "findings": report.findings,
        "coverage": _totals(report),
        "targets": report.coverage,
    }


def _totals(report: ValidationReport) -> dict[str, list[str]]:
    """Return modules by outcome, of the engine that does the least for them."""
    names: dict[str, list[str]] = {"applied": [], "ignored": [], "refused": [], "unmatched": []}
    worst: dict[str, str] = {}
    order = list(names)
    for engine in report.coverage:
        for module in engine.modules:
            known = worst.get(module.module, "applied")
            worst[module.module] = max(known, str(module.outcome), key=order.index)
    for module, outcome in worst.items():
        names[outcome].append(module)
    return names


def _text(report: ValidationReport) -> str:
    lines = [_coverage(engine) for engine in report.coverage if engine.modules or engine.verdict]
    lines += [_line(finding) for finding in report.findings]
    counts: dict[str, int] = dict.fromkeys(("error", "unchecked", "warning"), 0)
    for finding in report.findings:
        if str(finding.severity) in counts:
            counts[str(finding.severity)] += 1
    found = ", ".join(
        f"{number} unchecked" if kind == "unchecked" else rendering.count(number, kind)
        for kind, number in counts.items()
        if number
    )
    return "\n".join([*lines, found or "nothing found"])


def _coverage(engine: EngineCoverage) -> str:
    outcomes = list(dict.fromkeys(module.outcome for module in engine.modules))
    every = rendering.count(len(engine.modules), "module")
    modules = f"of {every} " + ", ".join(f"{engine.count(each)} {each}" for each in outcomes)
    if len(outcomes) == 1:
        modules = f"{'all ' if len(engine.modules) > 1 else ''}{every} {outcomes[0]}"
    return f"{engine.target}: " + "; ".join(
        filter(None, (f"{engine.verdict or ''}", modules if outcomes else ""))
    )


def _line(finding: Finding) -> str:
    where = f"{finding.where}: " if finding.modules else ""
    engine = f" [{finding.target}]" if finding.target else ""
    line = rendering.printable(
        f"{finding.severity} {finding.code}{engine} {where}{finding.message}"
    )
    return f"{line}\n  {rendering.printable(finding.hint)}" if finding.hint else line
