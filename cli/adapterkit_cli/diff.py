"""`adapterkit diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit_cli import manner, options, rendering
from adapterkit_cli.progress import watching

if TYPE_CHECKING:
    from adapterkit import DiffReport

_SHOWN = 10


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
    *,
    as_json: bool,
) -> None:
    """Compare the updates of two adapters; exit 1 if they differ.

    A and B may be of any formats. The relative error of a module is that of its ΔW in B against
    that in A, in the Frobenius norm.
    """
    import adapterkit

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
    if as_json:
        rendering.emit_json(report)
    else:
        rendering.emit(_text(report))
    ctx.exit(0 if report.equal else 1)


def _text(report: DiffReport) -> str:
    modules = rendering.count(len(report.modules), "module")
    error = rendering.short(report.max_relative_error)
    verdict = "equal" if report.equal else "different"
    lines = [f"{verdict}: {modules} compared, largest relative error {error}"]
    lines += [rendering.printable(sentence) for sentence in report.diagnosis]
    if not report.equal:
        lines += _worst(report)
    for name, alone in (("A", report.only_in_a), ("B", report.only_in_b)):
        lines += _shortened([f"only in {name}: {rendering.printable(each)}" for each in alone])
    return "\n".join(lines)


def _worst(report: DiffReport) -> list[str]:
    """Return a table of the modules that differ most; those that agree are left out."""
    # NaN is no agreement either.
    apart = [m for m in report.modules if not m.relative_error <= report.tolerance]
    if not apart:
        return []
    rows = [
        (
            module.module,
            rendering.short(module.relative_error),
            "-" if module.cosine is None else f"{module.cosine:.6f}",
            "-" if module.norm_ratio is None else f"{module.norm_ratio:.6g}",
        )
        for module in apart
    ]
    header = ("module", "relative error", "cosine", "norm ratio")
    first, *lines = rendering.columns(rows, header=header).split("\n")
    return ["", first, *_shortened(lines)]


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= _SHOWN or manner.verbose():
        return lines
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN:,} more; --json or -v lists all"]
