"""`adapterkit architectures`."""

from __future__ import annotations

import click

from adapterkit_cli import options, rendering


@click.command("architectures")
@options.as_json
def command(*, as_json: bool) -> None:
    """List the model families whose adapters can be converted.

    `verified` says how: `engine`, the logits are equal in llama.cpp; `dense`, the full weights are;
    `no`, only with --unverified.
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
            }
            for family in known
        ]
        rendering.emit_json({"architectures": listed})
        return
    rows = [(f.gguf, f.title, f.verified, ", ".join(f.classes)) for f in known]
    header = ("llama.cpp", "family", "verified", "Hugging Face classes")
    rendering.emit(rendering.columns(rows, header=header))
