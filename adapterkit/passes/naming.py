"""The names of the base's own class, for programs that look for very paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.base.places import Places
from adapterkit.keys import TensorKey
from adapterkit.notes import Note
from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from adapterkit.model import AdapterTensorSet

NAMES = "names"


def named(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the same updates under the paths that their modules have in the base's class.

    Without a base, or with one whose names are not known, nothing changes.
    """
    if context.base is None or context.base.kind != "hf" or adapter.engine_layout:
        return Passed(adapter)
    places = Places(context.base)
    names = {key.module: places.live(key.module) for key in adapter.tensors}
    moved = {old: new for old, new in names.items() if old != new}
    if not moved or len(set(names.values())) < len(names):
        return Passed(adapter)
    changed = adapter.replace(
        tensors={
            TensorKey(names[key.module], key.role): tensor
            for key, tensor in adapter.tensors.items()
        },
        scales={names.get(name, name): scale for name, scale in adapter.scales.items()},
        kinds={names.get(name, name): kind for name, kind in adapter.kinds.items()},
    )
    old, new = next(iter(moved.items()))
    note = f"{len(moved)} modules are named as the base's class has them: {old} is {new}"
    return Passed(changed, (Note(note),))
