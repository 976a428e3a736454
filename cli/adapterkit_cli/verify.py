"""`adapterkit verify`."""

from __future__ import annotations

import click

from adapterkit_cli import options, rendering
from adapterkit_cli.progress import watching


@click.command(
    "verify",
    epilog=options.examples(
        "adapterkit verify my-adapter.gguf",
        "adapterkit verify my-adapter.gguf --against my-adapter --base base/",
    ),
)
@click.argument("file", metavar="FILE", type=options.PATH)
@click.option(
    "--against",
    metavar="SRC",
    type=options.PATH,
    help="What it was made from, of any format: every update is compared.",
)
@options.reading
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    file: str,
    against: str | None,
    base: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    *,
    as_json: bool,
) -> None:
    """Check a file against the proof that it carries.

    Exit code 1 if something was changed.

    The proof lies in the metadata of files that adapterkit wrote. It is no signature.
    """
    from adapterkit import verify

    with watching("verifying"):
        report = verify(
            file, against=against, base=base, dialect=dialect, alpha=alpha, as_format=as_format
        )
    rendering.answer(report, as_json=as_json)
    ctx.exit(0 if report.sound else 1)
