"""Losses that do not depend on the format which has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from adapterkit.advice import MERGE_INSTEAD
from adapterkit.keys import Role, TensorKey
from adapterkit.model.adapter import SETTINGS, AdapterTensorSet
from adapterkit.model.beside import lost_beside
from adapterkit.model.update import Kind
from adapterkit.notes import Loss, first_and_more

# The code of a frozen copy of a table that is not the base's own.
OTHER_TABLE = "other-table"
# What an adapter may be beside its tensors and settings, and what it is called.
_MORE = {
    "rank_conflicts": "ranks that contradict each other",
    "unstored": "tensors that the config promises",
    "undeclared": "tensors that the config denies",
    "unplaced": "modules without a place",
    "tied": "tied tables",
}


def lost_tensors(code: str, keys: Iterable[TensorKey], message: str, *, drop: bool = True) -> Loss:
    """Name many tensors by their modules, as `first and 13 more`; `drop` says that they can go."""
    keys = tuple(keys)
    modules = list(dict.fromkeys(key.module for key in keys))
    return Loss(code, first_and_more(modules), message, keys if drop else ())


def other_tables(losses: Iterable[Loss]) -> tuple[TensorKey, ...]:
    """Return the frozen copies that losses of this pass name."""
    return tuple(key for loss in losses if loss.code == OTHER_TABLE for key in loss.drops)


def tensors_of(adapter: AdapterTensorSet, modules: Iterable[str]) -> list[TensorKey]:
    """Return the tensors of some modules, in the adapter's order."""
    wanted = set(modules)
    return [key for key in adapter.tensors if key.module in wanted]


def lost_roles(
    adapter: AdapterTensorSet, reasons: Mapping[Role, tuple[str, str]]
) -> Iterator[Loss]:
    """Name the tensors of roles that a format does not hold, each with its code and reason."""
    for role, (code, message) in reasons.items():
        if keys := [key for key in adapter.tensors if key.role is role]:
            yield lost_tensors(code, keys, message)


def lost_named_settings(
    adapter: AdapterTensorSet, reasons: Mapping[str, tuple[str, str]]
) -> Iterator[Loss]:
    """Name the settings that a format does not hold, each with its code and reason."""
    for field, (code, message) in reasons.items():
        if getattr(adapter, field):
            shown = SETTINGS[field]
            yield Loss(code, f"{shown} = {adapter.settings[shown]!r}", message)


def lost_layout(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Name the modules whose rows only llama.cpp can use."""
    if adapter.engine_layout:
        message = "its rows are in llama.cpp's order; give the base model with --base"
        yield Loss("engine-layout", first_and_more(list(adapter.engine_layout)), message)


def lost_beyond_pairs(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Name all that is no pair of matrices with a scale, for a format that holds nothing else."""
    factors = {Role.LORA_A, Role.LORA_B}
    others = [str(key) for key in adapter.tensors if key.role not in factors]
    odd = [module for module, kind in adapter.kinds.items() if kind is not Kind.LINEAR]
    for names, message in (
        (others, "is no factor, and has no place in this format"),
        (odd, "is no update of a matrix, and has no place in this format"),
    ):
        if names:
            yield Loss("beyond-pairs", first_and_more(names), message)
    for field, shown in _MORE.items():
        if getattr(adapter, field):
            yield Loss("beyond-pairs", shown, "has no place in this format")
    yield from lost_beside(adapter.beside)
    if adapter.base.name:
        yield Loss("base", adapter.base.name, "is not recorded in this format", blocks=False)
    yield from lost_settings(adapter)
    yield from lost_metadata(adapter)


def lost_settings(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Name every setting, for a format that holds none of them; nothing can be dropped."""
    message = "has no place in this format"
    reasons = {field: (field.replace("_", "-"), message) for field in SETTINGS}
    yield from lost_named_settings(adapter, reasons)
    yield from lost_layout(adapter)


def lost_columns(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Name DoRA by column, for a format whose magnitudes are those of rows."""
    message = f"DoRA by column has a place in kohya and comfyui alone; {MERGE_INSTEAD}"
    yield from lost_roles(adapter, {Role.COLUMN_MAGNITUDE: ("dora-columns", message)})


def lost_metadata(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Say that free text is left out, which changes nothing that an adapter does."""
    if adapter.metadata:
        names = first_and_more(list(adapter.metadata))
        yield Loss("metadata", names, "free text of the source is left out", blocks=False)
