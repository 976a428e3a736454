"""`adapterkit architectures`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit_cli import options, rendering

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN = 2


@click.command("architectures")
@options.as_json
def command(*, as_json: bool) -> None:
    """List the model families whose adapters can be converted.

    `verified` says how: `engine`, the logits are equal in llama.cpp; `dense`, the full weights are;
    `no`, only with --unverified. `inert` names llama.cpp tensors whose adapters load and are never
    applied: only merging carries them.
    """
    from adapterkit.architectures import families, load

    known = [load(name) for name in families()]
    if as_json:
        listed = [
            {
                "name": family.name,
                "title": family.title,
                "gguf": family.gguf,
                "classes": family.classes,
                "model_types": family.model_types,
                "verified": family.verified,
                "inert": family.inert,
                "inert_build": family.inert_build,
            }
            for family in known
        ]
        rendering.emit_json({"architectures": listed})
        return
    rows = [
        (
            family.gguf,
            family.title,
            family.verified,
            _listed(family.classes),
            " ".join(name.removeprefix("blk.{i}.") for name in family.inert),
        )
        for family in known
    ]
    header = ("llama.cpp", "family", "verified", "Hugging Face classes", "inert in llama.cpp")
    rendering.emit(rendering.columns(rows, header=header))


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are; `--json` has all."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
