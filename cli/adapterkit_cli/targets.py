"""`adapterkit targets`."""

from __future__ import annotations

import click

from adapterkit_cli import options, rendering


@click.command("targets")
@options.as_json
def command(*, as_json: bool) -> None:
    """List the serving engines whose rules are known."""
    from adapterkit import load_target, target_names

    targets = [load_target(name) for name in target_names()]
    if as_json:
        rendering.emit_json({"targets": targets})
        return
    rows = [
        (target.name, target.title, str(len(target.rules) + len(target.names)), target.source)
        for target in targets
    ]
    rendering.emit(rendering.columns(rows, header=("engine", "title", "rules", "source")))
