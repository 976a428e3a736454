"""`adapterkit validate`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from adapterkit_cli import answers, manner, options, rendering
from adapterkit_cli.choice import Choice
from adapterkit_cli.progress import watching

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit import Attempt, ValidationReport

# What is said of several adapters in the end, and the severity that it counts.
_WORST = {
    "with errors": "error",
    "unreadable": "",
    "unchecked": "unchecked",
    "with warnings": "warning",
}


@click.command(
    "validate",
    epilog=options.examples(
        "adapterkit validate my-adapter --base base/",
        "adapterkit validate my-adapter --base base/ --target llama.cpp --target vllm@0.33",
        "adapterkit validate adapters/* --base base/ --fail-on warning --ignore AK110",
        "adapterkit validate adapters/* --base base/ --sarif > adapters.sarif",
        "adapterkit validate --explain AK304",
    ),
)
@click.argument("sources", metavar="SRC...", type=options.PATH, nargs=-1)
@options.reading
@click.option(
    "--target",
    "targets",
    metavar="ENGINE[@VERSION]",
    multiple=True,
    shell_complete=options.engine_names,
    help="Engine that it is for, one of `adapterkit list engines`; may be repeated.",
)
@click.option(
    "--fail-on",
    type=Choice(["error", "warning"]),
    default="error",
    show_default=True,
    help="What ends with exit code 1.",
)
@click.option(
    "--ignore",
    metavar="CODE",
    multiple=True,
    shell_complete=options.code_names,
    help="Leave the findings of a code out; may be repeated.",
)
@click.option(
    "--explain",
    metavar="CODE",
    shell_complete=options.code_names,
    help="Say what a code means and what to do, and stop.",
)
@options.jobs
@options.html
@options.force
@manner.shape_option("sarif", "Print SARIF 2.1.0, for code scanning.")
@options.as_results
@click.pass_context
def command(
    ctx: click.Context,
    sources: tuple[str, ...],
    base: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    targets: tuple[str, ...],
    fail_on: str,
    ignore: tuple[str, ...],
    explain: str | None,
    jobs: int | None,
    html: str | None,
    *,
    force: bool,
) -> None:
    """Say whether an adapter works: on a base, in an engine.

    Exit code 1 for errors, 5 where something could not be checked, else 0; of several adapters the
    worst.
    """
    if explain:
        rendering.emit(_explained(explain))
        return
    if not sources:
        raise click.UsageError("SRC is missing; name an adapter, or a code with --explain")
    import adapterkit

    options.check_page(html, force=force)
    with watching("validating", "steps" if len(sources) == 1 else "adapters") as progress:
        attempts = adapterkit.for_each(
            adapterkit.validate,
            sources,
            jobs=jobs,
            progress=progress,
            base=base,
            targets=targets,
            ignore=ignore,
            dialect=dialect,
            alpha=alpha,
            as_format=as_format,
        )
    if html is not None:
        adapterkit.write_page(adapterkit.validation_page(attempts), html, force=force)
        rendering.remark("report", html)
    if report := answers.single(attempts):
        rendering.emit(report.text(rendering.pen()))
        ctx.exit(report.code(fail_on))
    _emit(attempts)
    answers.tell_failures(attempts)
    ctx.exit(answers.exit_code(attempts, lambda report: report.code(fail_on)))


def _emit(attempts: Sequence[Attempt[ValidationReport]]) -> None:
    if manner.shape() == "sarif":
        from adapterkit_cli import sarif

        rendering.emit(sarif.document(attempts))
        return
    record = _row if manner.shape() == "csv" else _json
    if not answers.emit(attempts, record):
        rendering.emit(_several(attempts))


def _explained(code: str) -> str:
    from adapterkit import explanations
    from adapterkit.checks.findings import known_code

    found = explanations()[known_code(code)]
    return "\n".join(
        [f"{found.code}: {found.title}", found.meaning, found.matters, f"do: {found.action}"]
    )


def _json(report: ValidationReport) -> dict[str, object]:
    targets = [
        {
            "engine": engine.engine,
            "version": engine.version or None,
            "verdict": engine.verdict,
            "coverage": engine.coverage,
            "modules": engine.modules,
        }
        for engine in report.targets
    ]
    return {
        "source": report.source,
        "format": report.format,
        "base": report.base,
        "targets": targets,
        "findings": report.findings,
    }


def _row(report: ValidationReport) -> dict[str, object]:
    """Return the row of a table: counts, codes, and what becomes of it in each engine."""
    return {
        "source": report.source,
        "format": report.format,
        "base": report.base,
        "errors": report.count("error"),
        "warnings": report.count("warning"),
        "unchecked": report.count("unchecked"),
        "codes": list(dict.fromkeys(finding.code for finding in report.findings)),
        **{engine.reference: engine.verdict for engine in report.targets},
    }


def _several(attempts: Sequence[Attempt[ValidationReport]]) -> str:
    """Return what was found in each of several adapters, and the counts of all."""
    lines: list[str] = []
    for attempt in attempts:
        name = click.style(rendering.printable(attempt.source), bold=True)
        if attempt.result is None:
            lines.append(f"{name}: {rendering.coloured('unreadable')}")
            continue
        found = attempt.result.lines(rendering.pen())
        lines.append(f"{name}: {attempt.result.counts}")
        lines += [f"  {line}" for line in found]
    worst = Counter(_worst(attempt.result) for attempt in attempts)
    more = [f"{worst[kind]} {kind}" for kind in _WORST if worst[kind]]
    total = rendering.count(len(attempts), "adapter")
    return "\n".join([*lines, f"{total}: {', '.join(more) or 'nothing found'}"])


def _worst(report: ValidationReport | None) -> str:
    """Return the worst that is said of an adapter, one of _WORST; empty if nothing is."""
    if report is None:
        return "unreadable"
    found = {kind for kind, severity in _WORST.items() if severity and report.count(severity)}
    return next((kind for kind in _WORST if kind in found), "")
