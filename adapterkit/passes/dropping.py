"""Leave out what a target cannot hold, where that is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.model.tying import module_of, spelled_out
from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from adapterkit.model import AdapterTensorSet


def drop(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the adapter without the tensors that the context's losses name.

    Where one name of a tied update is among them, the others stand for themselves from then on.
    """
    dropped = {key for loss in context.losses for key in loss.drops}
    if not dropped:
        return Passed(adapter)
    tied = {name for table, names in adapter.tied.items() for name in (table, *names)}
    if tied & set(map(module_of, dropped)):
        adapter = spelled_out(adapter)
    left = {key: tensor for key, tensor in adapter.tensors.items() if key not in dropped}
    return Passed(adapter.replace(tensors=left), losses=context.losses)
