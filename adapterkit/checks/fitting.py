"""Findings about an adapter on a base model: family, layers, targets, dimensions, identity."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule, in_tower
from adapterkit.base.fit import misfits, whole_misfits
from adapterkit.base.originals import plain_name
from adapterkit.base.places import Places
from adapterkit.checks.findings import Finding, Severity, named
from adapterkit.checks.structure import peft_config
from adapterkit.errors import UncheckableError, UnsupportedError
from adapterkit.keys import Role
from adapterkit.lora_config.config import NO_TARGETS
from adapterkit.lora_config.selection import selection
from adapterkit.model import GgufSource
from adapterkit.passes.protocol import Context
from adapterkit.passes.registry import apply

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet

_RESIZED = (
    "give the base with the vocabulary of the training (resize_token_embeddings, save_pretrained)"
)
_HEADLESS = (
    "load the base as a class that has it (AutoModelForSequenceClassification for a classifier): "
    "PEFT leaves it out otherwise, and says nothing"
)
_CODES = {"layer": "AK302", "expert": "AK310", "missing": "AK303", "shape": "AK304"}


def check_fit(adapter: AdapterTensorSet, base: BaseModel | None) -> Iterator[Finding]:
    """Yield every finding about the base; what could not be looked at is said to be so."""
    if base is None:
        hint = "give the base model with --base"
        message = "no base model is known: targets and dimensions are unchecked"
        yield Finding("AK300", Severity.UNCHECKED, (), message, hint)
        return
    if base.layout == "checkpoint":
        from adapterkit.formats.diffusion.on_base import on_base

        try:
            adapter = on_base(adapter, base)
        except UnsupportedError as error:
            hint = "is it the right base?"
            yield Finding("AK303", Severity.ERROR, named(error.where), error.message, hint)
            return
    if (other := other_architecture(adapter, base)) is not None:
        title = base.architecture.gguf or base.architecture.title
        message = f"is made for {other}, the base is {title}"
        yield Finding("AK301", Severity.ERROR, (), message, "give the base it was made for")
        return
    yield from _identity(adapter, base)
    kept: Mapping[str, str] = adapter.engine_layout
    known = [m for m, n in kept.items() if base.kind == "hf" or f"{n}.weight" in base.tensors]
    if known:
        message = "keeps llama.cpp's layout, and the base does not undo it"
        yield Finding("AK306", Severity.UNCHECKED, named(known[0]), message)
    places = Places(base)
    for pair in adapter.pairs():
        if pair.module not in kept and _unknown(pair.module, places):
            message = f"is no module of {base.architecture.title}"
            yield Finding("AK303", Severity.ERROR, (pair.module,), message, "is it the right base?")
    try:
        yield from _misfits(adapter, base)
    except UnsupportedError as error:
        yield Finding("AK305", Severity.UNCHECKED, named(error.where), error.message)
    yield from _whole(adapter, base)
    yield from _copies(adapter, base)
    yield from _depth(adapter, base)
    yield from _selection(adapter, base)


def _selection(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Finding]:
    """Report targets that select nothing of the base: PEFT raises an error then."""
    config = peft_config(adapter)
    chosen = selection(config)
    if chosen is None or config.get("target_parameters") or config["target_modules"] == NO_TARGETS:
        return
    # Quantised checkpoints have other tensors than `.weight` under a module's name.
    stored = [name.rpartition(".")[0] for name in base.names]
    if not stored and not base.architecture.known:
        return
    places = Places(base)
    live = chain(map(places.spelling.memory, stored), places.assembled())
    try:
        nothing = not any(map(chosen.selects, chain(stored, live, places.modules())))
    except UnsupportedError:
        return  # the sizes that are missing are said to be by the comparison of dimensions
    except UncheckableError:
        return  # the check of the adapter alone says so
    if nothing:
        message = f"target_modules = {config['target_modules']!r} selects no module of the base"
        hint = "write the names of the modules there; an expression must match a whole path"
        yield Finding("AK114", Severity.ERROR, (), message, hint)


def other_architecture(adapter: AdapterTensorSet, base: BaseModel) -> str | None:
    """Return the llama.cpp architecture that a GGUF adapter is for, if the base is not of it."""
    recorded = adapter.base.architecture
    wrong = isinstance(adapter.source, GgufSource) and recorded != base.architecture.gguf
    return str(recorded) if wrong else None


def _unknown(module: str, places: Places) -> bool:
    # Tables leave towers out, and so do some checkpoints that they describe.
    tower = places.base.architecture.known and in_tower(module)
    return places.has(module) is False and not tower


def _misfits(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Finding]:
    if base.kind == "gguf" and not isinstance(adapter.source, GgufSource):
        done = apply(["vocabulary"], adapter, Context(base=base, allow_lossy=True))
        adapter, lost = done.adapter, {loss.subject: loss.message for loss in done.losses}
        for note in done.notes:
            message = f"{note.text}, if it is converted for this base"
            hint = lost.get(note.subject or "", "")
            yield Finding("AK308", Severity.WARNING, named(note.subject), message, hint)
    for wrong in misfits(adapter, base):
        if wrong.kind == "unknown":
            yield Finding("AK305", Severity.UNCHECKED, named(wrong.module), wrong.message)
            continue
        hint = "is it the right base?"
        # Where rows are moved, the message asks so itself: it is raised by other commands too.
        message = wrong.message.removesuffix(f"; {hint}")
        yield Finding(_CODES[wrong.kind], Severity.ERROR, named(wrong.module), message, hint)


def _whole(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Finding]:
    """Report whole parameters, and rows of tokens, for which the base has no place of that size.

    PEFT refuses both; it resizes no vocabulary by itself. A parameter that the class does not have,
    mostly a head, it leaves out and says nothing.
    """
    places = Places(base)
    for key in adapter.tensors if base.kind == "hf" else ():
        if key.role is Role.FULL and places.lacks(key.module):
            title = ", ".join(base.classes) or "the base"
            message = f"was trained whole, and {title} has no such parameter"
            yield Finding("AK312", Severity.WARNING, (key.module,), message, _HEADLESS)
    for wrong in whole_misfits(adapter, base):
        hint = _RESIZED if wrong.kind == "rows" else "is it the right base?"
        yield Finding("AK313", Severity.ERROR, (wrong.module,), wrong.message, hint)


def _copies(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Finding]:
    """Report frozen copies of tables that are not the base's: what runs without them is another."""
    for loss in apply(["copies"], adapter, Context(base=base)).losses:
        what, _, hint = loss.message.partition("; ")
        yield Finding("AK314", Severity.ERROR, (loss.subject,), what, hint)


def _depth(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Finding]:
    """Report adapters of all layers of a shallower model: a sibling's fit in every dimension."""
    matches = [find_rule(base.architecture, pair.module) for pair in adapter.pairs()]
    layers = {match.layer for match in matches if match and match.layer is not None}
    depth = base.sizes.get("layers")
    if not layers or depth is None or _chosen(adapter):
        return
    last = max(layers)
    if layers == set(range(last + 1)) and last + 1 < depth:
        message = f"ends at layer {last}, the base has {depth} layers"
        yield Finding("AK309", Severity.WARNING, (), message, "was it made for a smaller model?")


def _chosen(adapter: AdapterTensorSet) -> bool:
    """Tell whether the adapter itself says that it is for some layers only."""
    config = peft_config(adapter)
    return config.get("layers_to_transform") is not None or not config


def _identity(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Finding]:
    mine, theirs = adapter.base.name, base.name
    if not mine or not theirs:
        return
    words = [plain_name(name) for name in (mine, theirs)]
    if words[0] not in words[1] and words[1] not in words[0]:
        message = f"was trained on {mine}, the base calls itself {theirs}"
        yield Finding("AK307", Severity.WARNING, (), message)
