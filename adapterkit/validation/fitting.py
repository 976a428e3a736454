"""Findings about an adapter on a base model: family, layers, targets, dimensions, identity."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule, in_tower
from adapterkit.base.fit import misfits
from adapterkit.errors import UnsupportedError
from adapterkit.validation.findings import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet


def check_fit(adapter: AdapterTensorSet, base: BaseModel | None) -> Iterator[Finding]:
    """Yield every finding about the base; what could not be looked at is said to be so."""
    if base is None:
        hint = "give the base model with --base"
        message = "no base model is known: targets and dimensions are unchecked"
        yield Finding("AK300", Severity.UNCHECKED, None, message, hint)
        return
    recorded = adapter.base.architecture
    if recorded and adapter.extras.get("gguf") and recorded != base.architecture.gguf:
        message = f"is made for {recorded}, the base is {base.architecture.gguf}"
        yield Finding("AK301", Severity.ERROR, None, message, "give the base it was made for")
        return
    yield from _identity(adapter, base)
    if kept := adapter.traits.get("engine_layout"):
        message = "keeps llama.cpp's layout, and the base does not undo it"
        yield Finding("AK306", Severity.UNCHECKED, next(iter(kept)), message)
    for pair in adapter.pairs():
        if find_rule(base.architecture, pair.module) is None and not in_tower(pair.module):
            message = f"is no module of {base.architecture.title}"
            yield Finding("AK303", Severity.ERROR, pair.module, message, "is it the right base?")
    try:
        for module, message in misfits(adapter, base):
            code = "AK302" if "layers" in message else "AK304"
            yield Finding(code, Severity.ERROR, module, message, "is it the right base?")
    except UnsupportedError as error:
        yield Finding("AK305", Severity.UNCHECKED, error.where, error.message)


def _identity(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Finding]:
    mine, theirs = adapter.base.name, base.name
    if not mine or not theirs:
        return
    words = [_plain(name) for name in (mine, theirs)]
    if words[0] not in words[1] and words[1] not in words[0]:
        message = f"was trained on {mine}, the base calls itself {theirs}"
        yield Finding("AK307", Severity.WARNING, None, message)


def _plain(name: str) -> str:
    """Return the last part of a model's name without punctuation, case or quantisation suffix."""
    last = PurePath(name.rstrip("/")).name.lower()
    for suffix in ("-bnb-4bit", "-unsloth", "-gguf", "-awq", "-gptq"):
        last = last.removesuffix(suffix)
    return "".join(letter for letter in last if letter.isalnum())
