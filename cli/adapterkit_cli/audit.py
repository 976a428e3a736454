"""`adapterkit audit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit_cli import answers, manner, options, rendering
from adapterkit_cli.progress import watching

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit import AuditReport


@click.command(
    "audit",
    epilog=options.examples(
        "adapterkit audit my-adapter --suggest",
        "adapterkit audit a b c --html audit.html",
        "adapterkit audit my-adapter --base base/ --csv > modules.csv",
        "adapterkit audit trusted/* --bank bank.json",
        "adapterkit audit stranger --reference bank.json",
    ),
)
@click.argument("sources", metavar="SRC...", type=options.PATH, nargs=-1, required=True)
@options.reading
@click.option("--suggest", is_flag=True, help="Advise ranks, with the error that they would make.")
@click.option(
    "--tol",
    type=click.FloatRange(min=0, max=1, max_open=True),
    metavar="X",
    help="With --suggest: relative error of the whole update to stay within; 0.1 by default.",
)
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    metavar="PARAMS",
    help="With --suggest: parameters to stay within.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="With --base: intruder dimensions by full decompositions; hours for a large model.",
)
@click.option(
    "--bank",
    "bank_file",
    type=options.PATH,
    metavar="FILE",
    help="Write the statistics of all SRC as a bank to compare others with, and nothing else.",
)
@click.option(
    "--reference",
    type=options.PATH,
    metavar="FILE",
    help="Compare with the adapters of a bank: z-scores, no verdict.",
)
@options.force
@options.jobs
@options.as_results
@manner.shape_option("markdown", "Print a section for a model card.")
@click.option(
    "--html",
    "html",
    metavar="FILE",
    type=options.PATH,
    help="Write a report with charts as one self-contained file.",
)
@click.pass_context
def command(
    ctx: click.Context,
    sources: tuple[str, ...],
    base: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    tol: float | None,
    budget: int | None,
    html: str | None,
    bank_file: str | None,
    reference: str | None,
    jobs: int | None,
    *,
    suggest: bool,
    exact: bool,
    force: bool,
) -> None:
    """Measure updates, advise ranks, find what clashes.

    SRC is an adapter file or directory of any format. Every number comes from the singular values
    of ΔW, scale included, computed from the factors alone. Several adapters are also held against
    each other. With the weights of a --base, each update is also held against the weight that it
    changes.
    """
    if not suggest and (tol is not None or budget is not None):
        raise click.UsageError("--tol and --budget say what to --suggest")
    told: dict[str, Any] = {
        "base": base,
        "dialect": dialect,
        "alpha": alpha,
        "as_format": as_format,
    }
    if bank_file is not None:
        shaped = manner.shape() not in {"text", "json"}
        if any((suggest, exact, html, reference, shaped)):
            raise click.UsageError("--bank writes a bank and nothing else")
        _bank(bank_file, sources, told, force=force)
        return
    options.check_page(html, force=force)
    from adapterkit import audit

    with watching("auditing"):
        report = audit(
            *sources,
            suggest=suggest,
            budget=budget,
            tol=tol,
            exact=exact,
            reference=reference,
            keep_going=True,
            jobs=jobs,
            **told,
        )
    if html is not None:
        from adapterkit import write_html

        write_html(report, html, force=force)
        rendering.remark("report", html)
    if manner.shape() not in {"json", "jsonl"} and len(sources) == 1:
        for attempt in report.failed:
            attempt.get()
    _show(report)
    answers.tell_failures(report.failed)
    ctx.exit(answers.exit_code(report.failed))


def _bank(
    file: str,
    sources: tuple[str, ...],
    told: Mapping[str, Any],
    *,
    force: bool,
) -> None:
    from adapterkit import bank

    with watching("auditing"):
        written = bank(*sources, destination=file, force=force, **told)
    if manner.shape() == "json":
        rendering.emit_json(written)
        return
    rendering.emit(f"{rendering.printable(file)}: {written}")


def _show(report: AuditReport) -> None:
    shape = manner.shape()
    if shape in {"json", "jsonl"}:
        from adapterkit.auditing.json_document import document

        content = document(report)
        if shape == "json":
            rendering.emit_json(content)
            return
        for result in content["results"]:
            rendering.emit(rendering.json_line(result))
        return
    if shape in {"csv", "markdown"}:
        from adapterkit.auditing.tables import csv_table, markdown

        text = csv_table(report) if shape == "csv" else markdown(report)
        rendering.emit(text.rstrip("\n"))
        return
    rendering.emit(report.text(rendering.pen()))
    for audited in report.adapters:
        rendering.remarks("note", audited.notes)
