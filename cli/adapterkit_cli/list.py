"""`adapterkit list`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit_cli import architectures, formats, options, rendering, targets

if TYPE_CHECKING:
    from adapterkit import MethodSpec


@click.group("list")
def command() -> None:
    """List what adapterkit knows; every list has --json."""


command.add_command(formats.command, "formats")
command.add_command(architectures.command, "families")
command.add_command(targets.command, "engines")


@command.command("methods")
@options.as_json
def methods(*, as_json: bool) -> None:
    """List the methods of merge: what they take, what holds their result, whose they are.

    `exact in` says what holds the result without a loss: an adapter whose rank is the sum of the
    ranks, or only a base (--into). Names that mergekit and PEFT use follow.
    """
    from adapterkit import merge_methods

    known = merge_methods()
    if as_json:
        rendering.emit_json({"methods": [_document(spec) for spec in known]})
        return
    rows = [
        (
            spec.name,
            _numbers(spec),
            "a base" if spec.dense else "an adapter",
            spec.title,
            spec.source,
        )
        for spec in known
    ]
    header = ("name", "parameters", "exact in", "what it does", "source")
    rendering.emit(rendering.columns(rows, header=header))
    aliases = [each for spec in known for each in spec.aliases]
    others = [(each.name, each.method, each.programs, each.remark) for each in aliases]
    header = ("also called", "is", "in", "but")
    rendering.emit("")
    rendering.emit(rendering.columns(others, header=header))


def _numbers(spec: MethodSpec) -> str:
    numbers = [f"{name} {value:g}" for name, value in spec.parameters.items() if value is not None]
    return ", ".join([*numbers, *(["seed"] if spec.random else [])]) or "-"


def _document(spec: MethodSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "title": spec.title,
        "kind": spec.kind.value,
        "parameters": dict(spec.parameters),
        "random": spec.random,
        "weights": "shares" if spec.shares else "mean" if spec.mean else "sum",
        "adapters": list(spec.adapters),
        "exact_in": "base" if spec.dense else "adapter",
        "basis_dependent": spec.basis_dependent,
        "source": spec.source,
        "aliases": [each._asdict() for each in spec.aliases],
    }
