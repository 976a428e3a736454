"""Frozen copies of tables that are not the base's own.

PEFT saves the weight under an adapted embedding or output and loads it over the base's. Rows that
were set before training, such as those of spare tokens, are nowhere else: an adapter without the
copy is another model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.base.copies import first_other_row, table_of
from adapterkit.keys import Role, TensorKey
from adapterkit.model.losses import OTHER_TABLE
from adapterkit.notes import Loss, Note
from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet

_WAYS = (
    "give the base that it was trained on with --base (PeftModel.from_pretrained(model, "
    "ADAPTER).unload().save_pretrained(DIRECTORY) saves it), or leave the copy out with "
    "--allow-lossy"
)


def compared(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the adapter, each frozen copy that is not the base's a loss; dropped if that is so.

    Rows that only one of the two has are for the vocabulary's pass. Without the base's numbers
    nothing is compared, nor is what an initialisation changed.
    """
    if context.base is None:
        return Passed(adapter)
    losses: list[Loss] = []
    for key in adapter.tensors:
        changed = adapter.initialisation and TensorKey(key.module, Role.LORA_A) in adapter.tensors
        if key.role is Role.BASE_COPY and not changed:
            losses += _other(adapter, key, context.base)
    dropped = {key for loss in losses for key in loss.drops}
    if not dropped:
        return Passed(adapter)
    if context.allow_lossy:
        left = {key: tensor for key, tensor in adapter.tensors.items() if key not in dropped}
        return Passed(adapter.replace(tensors=left), losses=(*losses,))
    said = "its frozen copy (base_layer), which is not the base's own, stays with it"
    return Passed(adapter, tuple(Note(said, subject=loss.subject) for loss in losses), (*losses,))


def _other(adapter: AdapterTensorSet, key: TensorKey, base: BaseModel) -> list[Loss]:
    copy, table = adapter.tensors[key], table_of(key.module, base)
    if table is None:
        return []
    if copy.shape[1:] != table.shape[1:]:
        shapes = " and ".join(" x ".join(map(str, each.shape)) for each in (copy, table))
        differs = f"is another than the base's: {shapes}"
    else:
        row = first_other_row(copy, table, 0, min(copy.shape[0], table.shape[0]))
        if row is None:
            return []
        differs = (
            f"has another row {row} than {key.module}.weight of the base: it was set before "
            "training, or the base is another"
        )
    message = f"its frozen copy (base_layer) {differs}; {_WAYS}"
    return [Loss(OTHER_TABLE, key.module, message, (key,))]
