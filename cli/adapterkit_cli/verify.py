"""`adapterkit verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit_cli import options, rendering

if TYPE_CHECKING:
    from adapterkit import VerifyReport

_SHOWN = 20


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

    report = verify(
        file, against=against, base=base, dialect=dialect, alpha=alpha, as_format=as_format
    )
    if as_json:
        rendering.emit_json(report)
    else:
        rendering.emit(_text(report))
        rendering.remarks("note", report.notes)
    ctx.exit(0 if report.sound else 1)


def _text(report: VerifyReport) -> str:
    if report.sound:
        lines = ["sound: every byte and every update is as it was written"]
    else:
        lines = [f"changed: {rendering.count(len(report.changes), 'finding')}"]
    changes = report.changes
    lines += [
        rendering.printable(f"  {change.kind}: {change.where}: {change.message}")
        for change in changes[:_SHOWN]
    ]
    if len(changes) > _SHOWN:
        lines.append(f"  and {len(changes) - _SHOWN:,} more; --json lists all")
    names = ", ".join(f"{name} ({digest[:12]})" for name, digest in report.sources.items())
    lines.append(
        rendering.printable(
            f"written by adapterkit {report.written_by} from {names or 'memory'}, largest "
            f"relative error {rendering.short(report.max_relative_error)}"
        )
    )
    return "\n".join(lines)
