"""Factors of many tensors as one adapter, in the names and layout of what it is written for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule, from_engine, to_engine
from adapterkit.extraction.report import LeftOver
from adapterkit.extraction.whole import savable, saved_whole
from adapterkit.model import AdapterTensorSet
from adapterkit.notes import BaseReference

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.extraction.factors import Outcome
    from adapterkit.extraction.report import ExtractedModule
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.formats.spec import FormatSpec
    from adapterkit.model import Update

# Losses that are about one table; what loses it keeps all other modules.
_TABLES = frozenset({"tied-embedding", "tied-output"})


def fitting(
    outcomes: Sequence[Outcome], base: BaseModel, target: FormatSpec, options: FormatOptions
) -> list[Outcome]:
    """Return the outcomes without embeddings and outputs that the target has no place for.

    They are left over, with the target's own reason.
    """
    pairs, names = _named(outcomes, base, options.moe_layout)
    reasons = {
        key.module: loss.message
        for loss in target.losses(_adapter(pairs, base), options)
        if loss.code in _TABLES
        for key in loss.drops
    }
    fitted: list[Outcome] = []
    for outcome in outcomes:
        places = [place for pair in outcome.pairs for place in names[pair.module]]
        reason = next((reasons[place] for place in places if place in reasons), None)
        if reason is None or outcome.module is None:
            fitted.append(outcome)
            continue
        left = LeftOver(
            tensor=outcome.twin.name,
            reason=reason,
            relative_norm=outcome.module.relative_norm,
        )
        fitted.append(replace(outcome, pairs=(), module=None, left=left))
    return fitted


def saving(outcomes: Sequence[Outcome], base: BaseModel, options: FormatOptions) -> list[Outcome]:
    """Return the outcomes with what is left over saved whole, where PEFT can save it."""
    pairs, _ = _named(outcomes, base, options.moe_layout)
    return savable(outcomes, base, {pair.module for pair in pairs})


def assembled(
    outcomes: Sequence[Outcome], base: BaseModel, options: FormatOptions
) -> tuple[AdapterTensorSet, list[ExtractedModule]]:
    """Return the adapter that the outcomes make, and what they report under its names."""
    pairs, names = _named(outcomes, base, options.moe_layout)
    adapter = _adapter(pairs, base)
    reports = [
        replace(outcome.module, module=names[outcome.module.module][0])
        for outcome in outcomes
        if outcome.module is not None
    ]
    tensors = {**adapter.tensors, **saved_whole(outcomes, base)}
    tied = _tied(outcomes) if base.tied else {}
    return adapter.replace(tensors=tensors, tied=tied), reports


def _adapter(pairs: Iterable[Update], base: BaseModel) -> AdapterTensorSet:
    named = base.name or (str(base.path) if base.kind == "hf" else None)
    return AdapterTensorSet.of(pairs, {}, base=BaseReference(name=named))


def _tied(outcomes: Iterable[Outcome]) -> dict[str, tuple[str, ...]]:
    """Return the tables that are saved whole for several modules, in the base's one table."""
    saved = (each.twin.modules for each in outcomes if each.left is not None and each.left.saved)
    return {modules[0]: modules[1:] for modules in saved if len(modules) > 1}


def _named(
    outcomes: Iterable[Outcome], base: BaseModel, layout: str | None
) -> tuple[list[Update], dict[str, tuple[str, ...]]]:
    """Return updates under Hugging Face names, and old name -> new names.

    Experts take the layout that the base is loaded in, whatever the checkpoint spells.
    """
    architecture, sizes = base.architecture, base.sizes
    wanted = layout or base.expert_layout
    pairs = [pair for outcome in outcomes for pair in outcome.pairs]
    if base.kind == "gguf":
        mapped = from_engine(architecture, sizes, pairs, layout=wanted)
        return list(mapped.pairs), _inverse(mapped.sources)
    kept: list[Update] = []
    moved: list[Update] = []
    for pair in pairs:
        match = find_rule(architecture, pair.module)
        other = match is not None and match.rule.layout not in {None, wanted}
        (moved if other else kept).append(pair)
    names: dict[str, tuple[str, ...]] = {pair.module: (pair.module,) for pair in kept}
    if not moved:
        return kept, names
    there = to_engine(architecture, sizes, moved)
    back = from_engine(
        architecture, sizes, there.pairs, layout=wanted, text_prefix=base.text_prefix
    )
    engine = _inverse(back.sources)
    for old, parts in _inverse(there.sources).items():
        names[old] = tuple(new for part in parts for new in engine[part])
    return [*kept, *back.pairs], names


def _inverse(sources: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for new, olds in sources.items():
        for old in olds:
            found[old] = (*found.get(old, ()), new)
    return found
