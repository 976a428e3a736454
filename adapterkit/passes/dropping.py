"""Leave out what a target cannot hold, where that is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.keys import Role
from adapterkit.model.declared import denied
from adapterkit.model.tying import module_of, spelled_out
from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from collections.abc import Collection

    from adapterkit.keys import TensorKey
    from adapterkit.model import AdapterTensorSet


def drop(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the adapter without the tensors, and files beside it, that the losses name.

    Where one name of a tied update is among them, the others stand for themselves from then on.
    """
    dropped = {key for loss in context.losses for key in loss.drops}
    files = {name for loss in context.losses for name in loss.leaves}
    if not (dropped or files):
        return Passed(adapter)
    tied = {name for table, names in adapter.tied.items() for name in (table, *names)}
    if tied & set(map(module_of, dropped)):
        adapter = spelled_out(adapter)
    left = {key: tensor for key, tensor in adapter.tensors.items() if key not in dropped}
    declared = {
        setting: tuple(m for m in modules if any(key in left for key in denied(setting, m)))
        for setting, modules in adapter.undeclared.items()
    }
    without = adapter.replace(
        tensors=left,
        token_indices=_indices(adapter, left),
        beside=tuple(file for file in adapter.beside if file.name not in files),
        undeclared={setting: modules for setting, modules in declared.items() if modules},
    )
    return Passed(without, losses=context.losses)


def _indices(
    adapter: AdapterTensorSet, left: Collection[TensorKey]
) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Return the tokens of the rows that are left."""
    modules = {f".{key.module}" for key in left if key.role is Role.TOKEN_ROWS}
    numbers = adapter.token_indices
    if isinstance(numbers, tuple):
        return numbers if modules else ()
    return {
        name: tokens
        for name, tokens in numbers.items()
        if any(module.endswith(f".{name}") for module in modules)
    }
