"""The settings that make an engine run a stack, or the reason why it would not."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.engines.engine import Target, load_target
from adapterkit.engines.facts import facts
from adapterkit.engines.judgement import check_served
from adapterkit.errors import UnsupportedError, UsageError, unknown
from adapterkit.serving.members import StackedAdapter
from adapterkit.serving.stack import AdapterStack
from adapterkit.serving.sums import Conflict
from adapterkit.text import PLAIN, Pen, Shown

# vLLM's --max-lora-rank takes these and no other.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# vLLM reads an adapter with these as JSON, and all others as NAME=PATH.
_OF_JSON = frozenset(",=")


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ServingSettings(Shown):
    """What an engine is told.

    Attributes:
        engine: its name.
        adapters: what it runs, in order.
        settings: the words of its command line, or its requests, as text.
        conflicts: modules that two of the adapters change.
        warnings: what the engine does otherwise than the file says, one sentence each.
    """

    engine: str
    adapters: tuple[StackedAdapter, ...]
    settings: str
    conflicts: tuple[Conflict, ...]
    warnings: tuple[str, ...] = ()

    def text(self, pen: Pen = PLAIN) -> str:
        """Return the settings themselves."""
        del pen
        return self.settings

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each adapter."""
        return [
            {"name": each.name, "path": str(each.file), "scale": each.scale}
            for each in self.adapters
        ]

    def remarks(self) -> list[tuple[str, str]]:
        """Return the warnings, and the adapters that cancel each other."""
        cancelled = [
            ("warning", f"{each.module}: {each.first} and {each.second} cancel each other")
            for each in self.conflicts
            if each.cancels
        ]
        return [*Shown.remarks(self), *cancelled]


def serving_settings(stack: AdapterStack, engine: str) -> ServingSettings:
    """Return the exact settings that load a stack, at its scales, in an engine.

    Args:
        stack: at least one adapter.
        engine: one of `SERVED`, or `name@version`.

    Raises:
        UnsupportedError: if the engine would not run an adapter as it is, or cannot hold the stack.
        UsageError: if the stack is empty or the engine is unknown.
    """
    name, at, version = engine.partition("@")
    if name not in _LAUNCHES:
        raise unknown("engine", name, _LAUNCHES)
    members = stack.list()
    if not members:
        raise UsageError("no adapter was given")
    for member in members:
        if not f"{member.name}{member.file}".isprintable():
            message = (
                "its name or path holds control characters, which steer a terminal or end a line"
            )
            raise UnsupportedError(f"{message}; rename it", path=member.path)
    target = load_target(_TARGETS.get(name, name) + at + version)
    warnings = [sentence for member in members for sentence in _told(member, target)]
    text, more = _LAUNCHES[name](members, _flags(members, target), stack.base)
    return ServingSettings(
        engine=engine,
        adapters=members,
        settings=text,
        conflicts=stack.conflicts(),
        warnings=(*warnings, *more),
    )


def _told(member: StackedAdapter, engine: Target) -> list[str]:
    """Return what the engine does with one adapter that its user should know."""
    told = check_served(member.adapter, member.base, engine, path=member.file)
    left = [f"{file.name} ({file.what})" for file in member.adapter.beside if file.trained]
    told += [f"{name} is not loaded by {engine.title}" for name in left]
    return [f"{member.name}: {sentence}" for sentence in told]


def _flags(members: Sequence[StackedAdapter], engine: Target) -> str:
    """Return what the engine must be started with for what the adapters hold, each flag once."""
    flags = [f for m in members for f in engine.flags(facts(m.adapter, m.base, engine.models))]
    return "".join(f" {flag}" for flag in dict.fromkeys(flags))


def _llama_cpp(
    members: Sequence[StackedAdapter], flags: str, base: Path | None
) -> tuple[str, list[str]]:
    _check_gguf(members)
    for member in members:
        if set(str(member.file)) & {",", ":"}:
            raise UnsupportedError(
                "llama.cpp splits its list of adapters at commas and colons; rename it or give a "
                "relative path",
                path=member.path,
            )
    if all(member.scale == 1 for member in members):
        listed = ",".join(str(member.file) for member in members)
        return f"{_model(base)} --lora {shlex.quote(listed)}{flags}".lstrip(), []
    pairs = ",".join(f"{member.file}:{member.scale:g}" for member in members)
    return f"{_model(base)} --lora-scaled {shlex.quote(pairs)}{flags}".lstrip(), []


def _llama_server(
    members: Sequence[StackedAdapter], flags: str, base: Path | None
) -> tuple[str, list[str]]:
    _check_gguf(members)
    paths = " ".join(f"--lora {shlex.quote(str(member.file))}" for member in members)
    scales = [{"id": place, "scale": member.scale} for place, member in enumerate(members)]
    lines = [
        f"llama-server{_model(base)} {paths} --lora-init-without-apply{flags}",
        f"POST /lora-adapters {json.dumps(scales)}",
        f'or in a request: "lora": {json.dumps(scales)}',
    ]
    return "\n".join(lines), []


def _ollama(
    members: Sequence[StackedAdapter], flags: str, base: Path | None
) -> tuple[str, list[str]]:
    del flags
    _check_gguf(members)
    if len(members) > 1 or members[0].scale != 1:
        raise UnsupportedError(
            "Ollama takes one adapter at scale 1; combine the stack into one first "
            f"({_sum_of(members)}.gguf)"
        )
    told = ["no --base was given: put the GGUF base into FROM yourself"] if base is None else []
    return f"FROM {base or '<base>'}\nADAPTER {members[0].file}", told


def _vllm(
    members: Sequence[StackedAdapter], flags: str, base: Path | None
) -> tuple[str, list[str]]:
    del base
    told = _one_a_request(members, "vLLM")
    named = " ".join(shlex.quote(_for_vllm(member)) for member in members)
    rank = max((pair.rank for member in members for pair in member.adapter.pairs()), default=1)
    allowed = next((size for size in _VLLM_RANKS if size >= rank), rank)
    return f"--enable-lora --max-lora-rank {allowed}{flags} --lora-modules {named}", told


def _for_vllm(member: StackedAdapter) -> str:
    if _OF_JSON.isdisjoint(f"{member.name}{member.file}"):
        return f"{member.name}={member.file}"
    return json.dumps({"name": member.name, "path": str(member.file)}, ensure_ascii=False)


def _sglang(
    members: Sequence[StackedAdapter], flags: str, base: Path | None
) -> tuple[str, list[str]]:
    del base
    told = _one_a_request(members, "SGLang")
    named = " ".join(shlex.quote(f"{member.name}={member.file}") for member in members)
    return f"--lora-paths {named} --lora-strict-loading{flags}", told


def _model(base: Path | None) -> str:
    """Return the word that names the model, where it is a GGUF file."""
    return f" -m {shlex.quote(str(base))}" if base and base.suffix == ".gguf" else ""


def _sum_of(members: Sequence[StackedAdapter]) -> str:
    """Return the command that makes one adapter of all, at their scales."""
    paths = " ".join(shlex.quote(str(member.path or member.name)) for member in members)
    weights = ",".join(f"{member.scale:g}" for member in members)
    return f"adapterkit merge {paths} --method cat --weights {weights} -o combined"


def _one_a_request(members: Sequence[StackedAdapter], engine: str) -> list[str]:
    """Refuse what such an engine cannot do; return what it does with several."""
    for member in members:
        if member.scale != 1:
            raise UnsupportedError(
                f"{engine} serves an adapter at scale 1; write it at its scale first "
                f"({_sum_of([member])})",
                path=member.path,
            )
    if len(members) == 1:
        return []
    told = f"{engine} serves one of them a request; for their sum, combine the stack"
    return [f"{told} ({_sum_of(members)})"]


def _check_gguf(members: Sequence[StackedAdapter]) -> None:
    for member in members:
        if member.file.suffix != ".gguf":
            raise UnsupportedError(
                "the engine loads GGUF adapters; convert it first "
                "(adapterkit convert SRC -o FILE.gguf --base BASE)",
                path=member.path,
            )


_Launch = Callable[[Sequence[StackedAdapter], str, Path | None], tuple[str, list[str]]]
_LAUNCHES: dict[str, _Launch] = {
    "llama.cpp": _llama_cpp,
    "llama-server": _llama_server,
    "ollama": _ollama,
    "vllm": _vllm,
    "sglang": _sglang,
}
SERVED = tuple(_LAUNCHES)
# Where the rules of an engine stand under another name.
_TARGETS = {"llama-server": "llama.cpp"}
