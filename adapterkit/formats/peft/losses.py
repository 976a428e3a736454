"""What PEFT has no place for, whatever a file holds: one way to train each module."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from adapterkit.advice import MERGE_INSTEAD
from adapterkit.keys import Role, TensorKey
from adapterkit.notes import Loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.model import AdapterTensorSet

_MESSAGE = (
    "in PEFT a module has either factors, trained token rows, or a weight that is saved whole; "
    f"{MERGE_INSTEAD}"
)


def lost_seconds(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Name what modules hold that are trained in two ways: PEFT refuses it or leaves it out."""
    ways: dict[str, dict[Role | None, list[TensorKey]]] = defaultdict(dict)
    for key in adapter.tensors:
        if key.role is Role.BASE_COPY or (key.role is Role.FULL and key.module.endswith(".bias")):
            continue
        way = key.role if key.role in {Role.TOKEN_ROWS, Role.FULL} else None
        module = key.module.removesuffix(".weight") if way is Role.FULL else key.module
        ways[module].setdefault(way, []).append(key)
    for module, found in ways.items():
        ordered = [found[way] for way in (None, Role.TOKEN_ROWS, Role.FULL) if way in found]
        if drops := [key for keys in ordered[1:] for key in keys]:
            yield Loss("trained-twice", module, _MESSAGE, tuple(drops))
