"""`adapterkit diff`."""

from __future__ import annotations

import click

from adapterkit_cli import options, rendering
from adapterkit_cli.progress import watching


@click.command(
    "diff",
    epilog=options.examples(
        "adapterkit diff my-adapter my-adapter.gguf --base base/",
        "adapterkit diff before after --tolerance 0.01",
    ),
)
@click.argument("first", metavar="A", type=options.PATH)
@click.argument("second", metavar="B", type=options.PATH)
@options.reading
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Largest relative error that counts as equal; by default what the stored types explain.",
)
@options.html
@options.force
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    first: str,
    second: str,
    base: str | None,
    tolerance: float | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    html: str | None,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Compare the updates of two adapters; exit 1 if they differ.

    A and B may be of any formats. The relative error of a module is that of its ΔW in B against
    that in A, in the Frobenius norm.
    """
    import adapterkit

    options.check_page(html, force=force)
    with watching("comparing"):
        report = adapterkit.diff(
            first,
            second,
            base=base,
            tolerance=tolerance,
            dialect=dialect,
            alpha=alpha,
            as_format=as_format,
        )
    if html is not None:
        adapterkit.write_page(report.page(), html, force=force)
        rendering.remark("report", html)
    if as_json:
        rendering.emit_json(report)
    else:
        rendering.emit(report.text(rendering.pen()))
    ctx.exit(0 if report.equal else 1)
