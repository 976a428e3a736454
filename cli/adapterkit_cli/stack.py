"""`adapterkit stack`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from adapterkit_cli import options, rendering

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def _engine_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem | str]:
    """Complete the names of engines that stacks are printed for."""
    from adapterkit.serving.launch import SERVED

    del ctx, param
    return [name for name in SERVED if name.startswith(incomplete)]


@click.command(
    "stack",
    epilog=options.examples(
        "adapterkit stack style.gguf@0.7 facts.gguf --base base.gguf --for llama-server",
        "adapterkit stack style.gguf --base base.gguf --for ollama@0.33 > Modelfile",
        "adapterkit stack tone=adapters/a facts=adapters/b --for vllm",
    ),
)
@click.argument("adapters", metavar="[NAME=]A[@SCALE]...", nargs=-1, required=True)
@click.option(
    "--for",
    "engine",
    metavar="ENGINE[@VERSION]",
    required=True,
    shell_complete=_engine_names,
    help="Engine to print the settings for: llama.cpp, llama-server, ollama, vllm or sglang.",
)
@options.reading
@options.as_json
def command(
    adapters: tuple[str, ...],
    engine: str,
    base: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    *,
    as_json: bool,
) -> None:
    """Print the exact settings that load adapters with scales.

    Engines add the adapters of a stack; their order does not matter.
    """
    import adapterkit

    stack = adapterkit.AdapterStack(base)
    names, paths, scales = zip(*map(_parsed, adapters), strict=True)
    stack.load_all(
        paths, names=names, scales=scales, dialect=dialect, alpha=alpha, as_format=as_format
    )
    served = adapterkit.serving_settings(stack, engine)
    if as_json:
        rendering.emit_json(
            {
                "engine": served.engine,
                "adapters": served.rows(),
                "settings": served.settings,
                "conflicts": served.conflicts,
                "warnings": served.warnings,
            }
        )
        return
    rendering.show(served)


def _parsed(text: str) -> tuple[str | None, str, float]:
    """Split `NAME=A@SCALE`; a path may hold an = or an @ of its own."""
    path, at, number = text.rpartition("@")
    try:
        scale = float(number) if at and path else 1.0
    except ValueError:
        if os.path.lexists(path) and not os.path.lexists(text):
            message = f"{text}: {number!r} is no scale; write {path}@0.7"
            raise click.BadParameter(message, param_hint="'A@SCALE'") from None
        scale, path = 1.0, text
    path = path if at and path else text
    name, sign, rest = path.partition("=")
    named = sign and name and rest and not {"/", "."} & set(name) and not os.path.lexists(path)
    return (name, rest, scale) if named else (None, path, scale)
