"""`adapterkit formats`."""

from __future__ import annotations

import click

from adapterkit_cli import options, rendering


@click.command("formats")
@options.as_json
def command(*, as_json: bool) -> None:
    """List the formats, and what each cannot hold."""
    from adapterkit.registry import formats

    known = formats()
    if as_json:
        listed = [
            {
                "name": spec.name,
                "title": spec.title,
                "reads": spec.reads,
                "writes": spec.writes,
                "directory": bool(spec.files),
                "suffixes": spec.suffixes,
                "cannot_hold": spec.cannot_hold,
            }
            for spec in known
        ]
        rendering.emit_json({"formats": listed})
        return
    rows = [
        (spec.name, spec.title, _mark(spec.reads), _mark(spec.writes), spec.cannot_hold)
        for spec in known
    ]
    header = ("name", "what it is", "read", "write", "cannot hold")
    rendering.emit(rendering.columns(rows, header=header))


def _mark(able: bool) -> str:
    return "yes" if able else "no"
