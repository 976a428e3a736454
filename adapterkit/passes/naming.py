"""The names of the base's own class, for programs that look for very paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.base.peft_names import peft_names
from adapterkit.base.places import Places
from adapterkit.model.tying import module_of
from adapterkit.notes import Note
from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet


def named(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the same updates under the paths that their modules have in the base's class.

    Without a base, or with one whose names are not known, nothing changes.
    """
    if context.base is None or context.base.kind != "hf" or adapter.engine_layout:
        return Passed(adapter)
    return _renamed(adapter, _paths([adapter], context.base))


def named_to_load(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the same updates under the names by which PEFT leads them to their modules.

    They are other than those of the base's class where PEFT loses what it saved itself.
    """
    base = context.base
    if base is None or base.kind != "hf" or adapter.engine_layout:
        return Passed(adapter)
    names = peft_names(base.classes)
    moved = {old: names.written(old) for old in adapter.modules if names.loses(old)}
    moved = {old: new for old, new in moved.items() if old != new}
    if not moved:
        return Passed(adapter)
    old, new = next(iter(moved.items()))
    note = f"{len(moved)} modules are named as PEFT loads them: {old} is {new}"
    return Passed(adapter.renamed(moved), (Note(note),))


def named_alike(adapters: Sequence[AdapterTensorSet], base: BaseModel | None) -> tuple[Passed, ...]:
    """Return adapters of one base with one name for each of its modules.

    Programs that trained without the head leave out its prefix (`layers.0` for `model.layers.0`).
    Where two names are those of one module, all adapters have those of the base's class; without
    a base, nothing changes.
    """
    unchanged = tuple(map(Passed, adapters))
    if base is None or base.layout or any(each.engine_layout for each in adapters):
        return unchanged
    named = [set(each.modules) for each in adapters]
    if all(each == named[0] for each in named):
        return unchanged
    names = _paths(adapters, base)
    if len(set(names.values())) == len(names):
        return unchanged
    return tuple(_renamed(each, names) for each in adapters)


def missing_prefix(mine: Collection[str], theirs: Collection[str]) -> str:
    """Return what one of two adapters alone puts before every name; empty if nothing does.

    Args:
        mine: modules of one.
        theirs: modules of the other. Where both name one module alike, no prefix is missing.
    """
    if not set(mine).isdisjoint(theirs):
        return ""
    found = {
        name.removesuffix(end)
        for shorter, longer in ((set(mine), theirs), (set(theirs), mine))
        for name in longer
        for end in _ends(name)
        if end in shorter
    }
    return found.pop() if len(found) == 1 else ""


def _ends(name: str) -> Iterator[str]:
    """Yield what is left of a path without its first component, its first two, and so on."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _paths(adapters: Iterable[AdapterTensorSet], base: BaseModel) -> Mapping[str, str]:
    """Return the path in the base's class of every name that the adapters have for a module."""
    places = Places(base)
    keys = (key for adapter in adapters for key in adapter.tensors)
    names = dict.fromkeys(name for key in keys for name in (key.module, module_of(key)))
    tied = (names for adapter in adapters for names in adapter.tied.items())
    for table, others in tied:
        names |= dict.fromkeys((table, *others))
    return {name: places.live(name) for name in names}


def _renamed(adapter: AdapterTensorSet, names: Mapping[str, str]) -> Passed:
    moved = {old: names[old] for old in adapter.modules if names[old] != old}
    if not moved or len({names[old] for old in adapter.modules}) < len(adapter.modules):
        return Passed(adapter)
    old, new = next(iter(moved.items()))
    note = f"{len(moved)} modules are named as the base's class has them: {old} is {new}"
    return Passed(adapter.renamed(names), (Note(note),))
