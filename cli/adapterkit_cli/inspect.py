"""`adapterkit inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit.text import spread
from adapterkit_cli import answers, options, rendering
from adapterkit_cli.progress import watching

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit import Attempt, Summary


@click.command(
    "inspect",
    epilog=options.examples(
        "adapterkit inspect my-adapter",
        "adapterkit inspect adapters/* --csv > adapters.csv",
        "adapterkit inspect weights.pt --dialect torchtune --alpha 16 --base base/",
    ),
)
@click.argument("sources", metavar="SRC...", type=options.PATH, nargs=-1, required=True)
@options.reading
@options.jobs
@options.as_results
@click.pass_context
def command(
    ctx: click.Context,
    sources: tuple[str, ...],
    base: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    jobs: int | None,
) -> None:
    """Say what an adapter is: base, ranks, scales, targets.

    SRC is an adapter file or directory of any format. Broken adapters are shown too, with what is
    wrong; `problem` lines do not change the exit code. Of several, each is one row.
    """
    import adapterkit

    with watching("reading", "tensors" if len(sources) == 1 else "adapters") as progress:
        attempts = adapterkit.for_each(
            adapterkit.inspect,
            sources,
            jobs=jobs,
            progress=progress,
            base=base,
            dialect=dialect,
            alpha=alpha,
            as_format=as_format,
        )
    if summary := answers.single(attempts):
        rendering.show(summary)
        return
    if not answers.emit(attempts):
        rendering.emit(_table(attempts))
    answers.tell_failures(attempts)
    ctx.exit(answers.exit_code(attempts))


def _table(attempts: Sequence[Attempt[Summary]]) -> str:
    """Return a row for each of several adapters."""
    rows = [
        (attempt.source, *(_cells(attempt.result) if attempt.result else ("unreadable", *[""] * 6)))
        for attempt in attempts
    ]
    header = ("adapter", "format", "tuner", "modules", "rank", "scale", "size", "base model")
    return rendering.columns(rows, header=header)


def _cells(summary: Summary) -> tuple[str, ...]:
    return (
        summary.format or "",
        summary.tuner + (f", {len(summary.problems)} problems" if summary.problems else ""),
        f"{summary.modules:,}",
        spread(summary.ranks, summary.modules),
        spread(summary.scales, summary.modules),
        rendering.size(summary.bytes),
        summary.base_model or "",
    )
