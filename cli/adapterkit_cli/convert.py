"""`adapterkit convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit_cli import options, rendering

if TYPE_CHECKING:
    from adapterkit import ConversionReport


@click.command("convert")
@click.argument("source", metavar="SRC", type=options.PATH)
@options.destination
@options.reading
@options.writing
@click.option(
    "--for",
    "engine",
    metavar="ENGINE",
    shell_complete=options.engine_names,
    help="Make the exact changes that an engine needs, one of `adapterkit targets`.",
)
@options.moe_layout
@options.unverified
@options.allow_lossy
@click.option("--no-proof", is_flag=True, help="Do not write a proof into DST for `verify`.")
@options.as_json
def command(
    source: str,
    destination: str,
    to: str | None,
    base: str | None,
    outtype: str,
    engine: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    moe_layout: str | None,
    *,
    unverified: bool,
    allow_lossy: bool,
    force: bool,
    no_proof: bool,
    as_json: bool,
) -> None:
    """Write an adapter in another format, and prove it equal.

    The proof is read from the written file. DST appears only if every update ΔW in it
    equals that of SRC, to the rounding of the stored type.
    """
    import adapterkit

    report = adapterkit.convert(
        source,
        destination,
        to=to,
        for_engine=engine,
        dialect=dialect,
        alpha=alpha,
        as_format=as_format,
        base=base,
        outtype=outtype,
        moe_layout=moe_layout,
        unverified=unverified,
        allow_lossy=allow_lossy,
        force=force,
        proof=not no_proof,
    )
    if as_json:
        rendering.emit_json(report)
        return
    rendering.emit(_text(report))
    rendering.remarks("note", report.notes)
    for loss in report.losses:
        rendering.remark("dropped", f"{loss.subject}: {loss.message}")


def _text(report: ConversionReport) -> str:
    facts = [
        rendering.printable(report.destination),
        report.format,
        rendering.count(report.modules, "module"),
        rendering.count(report.parameters, "parameter"),
        rendering.size(report.bytes),
    ]
    return "  ".join(facts) + "\n" + _proof(report)


def _proof(report: ConversionReport) -> str:
    where = f"in all {report.modules:,} modules" if report.modules != 1 else "in the one module"
    error = rendering.short(report.max_relative_error)
    if report.max_relative_error and report.worst_module:
        error += f" ({rendering.printable(report.worst_module)})"
    return f"proof: ΔW equal {where}, largest relative error {error}"
