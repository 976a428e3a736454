"""Leave out what a target cannot hold, where that is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from adapterkit.model import AdapterTensorSet


def drop(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the adapter without the tensors that the context's losses name."""
    dropped = {key for loss in context.losses for key in loss.drops}
    if not dropped:
        return Passed(adapter)
    left = {key: tensor for key, tensor in adapter.tensors.items() if key not in dropped}
    return Passed(adapter.replace(tensors=left), losses=context.losses)
