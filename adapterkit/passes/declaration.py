"""Tensors that a file holds and its config denies.

PEFT and mlx-lm go by the config and leave them out without a word; whoever reads the tensors alone
applies them. Which of the two was trained nobody can tell from the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import LossyConversionError
from adapterkit.model.declared import undeclared, what_is_denied
from adapterkit.notes import Note
from adapterkit.passes.dropping import drop
from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from adapterkit.model import AdapterTensorSet


def settled(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the adapter as its config describes it, without what that denies.

    Raises:
        LossyConversionError: if there is something to leave out and that is not allowed.
    """
    losses = tuple(undeclared(adapter))
    if not losses:
        return Passed(adapter)
    path = adapter.provenance.path if adapter.provenance else None
    if not context.allow_lossy:
        raise LossyConversionError(losses, path=path)
    left = drop(adapter, Context(losses=losses)).adapter
    kinds = [what_is_denied(setting) for setting in adapter.undeclared]
    notes = tuple(Note(f"{what} left out: the config denies them") for what in kinds)
    return Passed(left, notes, losses)
