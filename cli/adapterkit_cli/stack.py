"""`adapterkit stack`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit_cli import options, rendering

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adapterkit import StackedAdapter

# vLLM's --max-lora-rank takes these and no other.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@click.command("stack")
@click.argument("adapters", metavar="[NAME=]A[@SCALE]...", nargs=-1, required=True)
@click.option(
    "--for",
    "engine",
    type=click.Choice(["llama.cpp", "llama-server", "ollama", "vllm", "sglang"]),
    required=True,
    help="Engine to print the settings for.",
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
    from adapterkit import AdapterStack

    stack = AdapterStack(base)
    for text in adapters:
        name, path, scale = _parsed(text)
        stack.load(path, name=name, scale=scale, dialect=dialect, alpha=alpha, as_format=as_format)
    members = stack.list()
    settings = _ENGINES[engine](members)
    conflicts = stack.conflicts()
    if as_json:
        shown = [{"name": m.name, "path": str(m.path), "scale": m.scale} for m in members]
        rendering.emit_json(
            {"engine": engine, "adapters": shown, "settings": settings, "conflicts": conflicts}
        )
        return
    rendering.emit(settings)
    for member in members:
        for file in member.adapter.beside:
            if file.trained:
                rendering.remark("note", f"{file.name} ({file.what}) is not loaded by the engine")
    for conflict in conflicts:
        if conflict.cancels:
            pair = f"{conflict.first} and {conflict.second}"
            rendering.remark("warning", f"{conflict.module}: {pair} cancel each other")


def _parsed(text: str) -> tuple[str | None, str, float]:
    """Split `NAME=A@SCALE`; a path may hold an = or an @ of its own."""
    path, at, number = text.rpartition("@")
    try:
        scale = float(number) if at and path else 1.0
    except ValueError:
        scale, path = 1.0, text
    path = path if at and path else text
    name, sign, rest = path.partition("=")
    named = sign and name and rest and not {"/", "."} & set(name) and not Path(path).exists()
    return (name, rest, scale) if named else (None, path, scale)


def _llama_cpp(members: Sequence[StackedAdapter]) -> str:
    from adapterkit.errors import UnsupportedError

    _need_gguf(members)
    for member in members:
        if set(str(member.path)) & {",", ":"}:
            raise UnsupportedError(
                "llama.cpp splits its list of adapters at commas and colons; rename it or give a "
                "relative path",
                path=member.path,
            )
    if all(member.scale == 1 for member in members):
        return "--lora " + shlex.quote(",".join(str(member.path) for member in members))
    pairs = ",".join(f"{member.path}:{member.scale:g}" for member in members)
    return "--lora-scaled " + shlex.quote(pairs)


def _llama_server(members: Sequence[StackedAdapter]) -> str:
    _need_gguf(members)
    paths = " ".join(f"--lora {shlex.quote(str(member.path))}" for member in members)
    scales = [{"id": place, "scale": member.scale} for place, member in enumerate(members)]
    return "\n".join(
        [
            f"llama-server {paths} --lora-init-without-apply",
            f"POST /lora-adapters {json.dumps(scales)}",
            f'or in a request: "lora": {json.dumps(scales)}',
        ]
    )


def _ollama(members: Sequence[StackedAdapter]) -> str:
    from adapterkit.errors import UnsupportedError

    _need_gguf(members)
    if len(members) > 1 or members[0].scale != 1:
        raise UnsupportedError(
            "Ollama takes one adapter at scale 1; combine the stack into one first "
            "(adapterkit merge --method cat --weights ... -o combined.gguf)"
        )
    return f"FROM <base>\nADAPTER {members[0].path}"


def _vllm(members: Sequence[StackedAdapter]) -> str:
    _check_one_a_request(members, "vLLM")
    rank = max(pair.rank for member in members for pair in member.adapter.pairs())
    allowed = next((size for size in _VLLM_RANKS if size >= rank), rank)
    return f"--enable-lora --max-lora-rank {allowed} --lora-modules {_by_name(members)}"


def _sglang(members: Sequence[StackedAdapter]) -> str:
    _check_one_a_request(members, "SGLang")
    return f"--lora-paths {_by_name(members)} --lora-strict-loading"


def _by_name(members: Sequence[StackedAdapter]) -> str:
    return " ".join(shlex.quote(f"{member.name}={member.path}") for member in members)


def _check_one_a_request(members: Sequence[StackedAdapter], engine: str) -> None:
    """Refuse what such an engine cannot do; say what it does with several."""
    from adapterkit.errors import UnsupportedError

    for member in members:
        if member.scale != 1:
            raise UnsupportedError(
                f"{engine} serves an adapter at scale 1; write it at its scale first "
                "(adapterkit merge --method cat --weights ... -o combined)",
                path=member.path,
            )
        if member.path.suffix == ".gguf":
            raise UnsupportedError(
                f"{engine} loads PEFT directories; adapterkit convert it first", path=member.path
            )
    if len(members) > 1:
        rendering.remark(
            "warning",
            f"{engine} serves one of them a request; for their sum, combine the stack "
            "(adapterkit merge --method cat --weights ... -o combined)",
        )


def _need_gguf(members: Sequence[StackedAdapter]) -> None:
    from adapterkit.errors import UnsupportedError

    for member in members:
        if member.path.suffix != ".gguf":
            raise UnsupportedError(
                "the engine loads GGUF adapters; convert it first "
                "(adapterkit convert -o adapter.gguf --base BASE)",
                path=member.path,
            )


_ENGINES: dict[str, Callable[[Sequence[StackedAdapter]], str]] = {
    "llama.cpp": _llama_cpp,
    "llama-server": _llama_server,
    "ollama": _ollama,
    "vllm": _vllm,
    "sglang": _sglang,
}
