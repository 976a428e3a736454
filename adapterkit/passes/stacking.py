"""Modules that an engine stacks into one: it wants factors of all, be they of zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.base.places import Places
from adapterkit.keys import Role
from adapterkit.model import Kind
from adapterkit.notes import Note
from adapterkit.passes.protocol import Context, Passed
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet, Update

# The last names of modules -> of those without which an engine that stacks them cannot.
_STACKED: Mapping[str, tuple[str, ...]] = {
    "q_proj": ("v_proj",),
    "k_proj": ("q_proj", "v_proj"),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
}


def stacked(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the same updates, with updates of zero for the modules that they are stacked with.

    A is that of the module beside, so that none is invented, and B is zero. DoRA stays as it is:
    it holds for all modules or none, and zeros would need magnitudes that are the base's own norms.
    """
    if any(key.role is Role.MAGNITUDE for key in adapter.tensors):
        return Passed(adapter)
    made = {
        name: _zero(name, pair, rows)
        for name, pair in missing(adapter, context.base).items()
        if context.base is not None and (rows := _rows(name, context.base)) is not None
    }
    if not made:
        return Passed(adapter)
    name = next(iter(made))
    note = f"{len(made)} modules have updates of zero, as {name}: they are stacked with others"
    return Passed(adapter.updated(made.values()), (Note(note),))


def missing(adapter: AdapterTensorSet, base: BaseModel | None) -> dict[str, Update]:
    """Return the modules of the base that are stacked with adapted ones, and one of those each."""
    if base is None:
        return {}
    places = Places(base)
    pairs = {pair.module: pair for pair in adapter.pairs() if pair.kind is Kind.LINEAR}
    return {
        name: pair
        for module, pair in pairs.items()
        for name in _partners(module)
        if name not in pairs and places.has(name)
    }


def _partners(module: str) -> Iterator[str]:
    block, _, leaf = module.rpartition(".")
    return (f"{block}.{other}" for other in _STACKED.get(leaf, ()))


def _rows(module: str, base: BaseModel) -> int | None:
    shape = Places(base).shape(module)
    return shape[0] if shape else None


def _zero(module: str, beside: Update, rows: int) -> Update:
    shape = (rows, beside.rank)
    b = LazyTensor(beside.b.dtype, shape, lambda: bytes(beside.b.dtype.nbytes(shape)))
    return replace(beside, module=module, b=b)
