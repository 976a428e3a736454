"""`adapterkit inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit_cli import options, rendering

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeVar

    from adapterkit import BesideEntry, Summary

    _Value = TypeVar("_Value")


@click.command("inspect")
@click.argument("source", metavar="SRC", type=options.PATH)
@options.reading
@options.as_json
def command(
    source: str,
    base: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    *,
    as_json: bool,
) -> None:
    """Say what an adapter is: base, ranks, scales, targets.

    SRC is an adapter file or directory of any format. Broken adapters are shown too, with what is
    wrong; `problem` lines do not change the exit code.
    """
    import adapterkit

    summary = adapterkit.inspect(
        source, base=base, dialect=dialect, alpha=alpha, as_format=as_format
    )
    if as_json:
        rendering.emit_json(summary)
        return
    rendering.emit(rendering.sheet(_entries(summary)))
    rendering.remarks("note", summary.notes)


def _entries(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("path", summary.path or ""),
        ("format", summary.format or ""),
        ("base model", summary.base_model or ""),
        ("architecture", summary.architecture or ""),
        ("tuner", summary.tuner),
        ("modules", f"{summary.modules:,}"),
        ("targets", _spread(summary.targets, summary.modules, always=True)),
        ("rank", _spread(summary.ranks, summary.modules)),
        ("scale", _spread(summary.scales, summary.modules)),
        ("traits", ", ".join(summary.traits)),
        ("replaced", ", ".join(summary.replaced)),
        *(("beside", _beside(file)) for file in summary.beside),
        ("parameters", f"{summary.parameters:,}"),
        ("dtype", _spread(summary.dtypes, sum(summary.dtypes.values()))),
        ("size", rendering.size(summary.bytes)),
        ("sha256", summary.sha256),
        *(("problem", problem) for problem in summary.problems),
    ]


def _beside(file: BesideEntry) -> str:
    return f"{file.name}: {file.what}, {rendering.size(file.bytes)}"


def _spread(counts: Mapping[_Value, int], total: int, *, always: bool = False) -> str:
    """Return `8`, or `8 (30), 16 (30)` where the value is not the same everywhere."""
    names = {_name(value): number for value, number in counts.items()}
    if len(names) == 1 and sum(names.values()) == total and not always:
        return next(iter(names))
    return ", ".join(f"{name} ({number:,})" for name, number in names.items())


def _name(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
