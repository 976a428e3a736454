"""What every TinyLoRA writer asks of an adapter first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.advice import MERGE_INSTEAD
from adapterkit.errors import UnsupportedError
from adapterkit.keys import PARTNERS
from adapterkit.model.beside import lost_beside
from adapterkit.model.declared import undeclared
from adapterkit.model.losses import lost_metadata, lost_settings
from adapterkit.notes import Loss, first_and_more
from adapterkit.tinylora.adapter import TinyAdapter, carried

if TYPE_CHECKING:
    from collections.abc import Container

    from adapterkit.keys import Role
    from adapterkit.model import AdapterTensorSet

NO_PLACE = f"TinyLoRA has no place for it; {MERGE_INSTEAD}, or leave it out with --allow-lossy"
_PROJECT = (
    "is a plain LoRA: its factors are no singular vectors of a base; `adapterkit tinylora project` "
    "fits coefficients to it and reports what they cannot reach"
)


def losses(adapter: AdapterTensorSet, *, holds: Container[Role] = ()) -> list[Loss]:
    """List what a TinyLoRA file cannot hold: tensors beside the update, and any other update.

    Args:
        adapter: the adapter.
        holds: roles beside the factors for which the form has a place.
    """
    found: list[Loss] = []
    others = [key for key in adapter.tensors if key.role not in PARTNERS and key.role not in holds]
    if others:
        named = first_and_more([str(key) for key in others])
        found.append(Loss("not-an-update", named, NO_PLACE, tuple(others)))
    if carried(adapter) is None:
        found.append(Loss("not-tinylora", "the update", _PROJECT))
    found += [*lost_settings(adapter), *undeclared(adapter), *lost_beside(adapter.beside)]
    return [*found, *lost_metadata(adapter)]


def tiny_of(adapter: AdapterTensorSet) -> TinyAdapter:
    """Return the TinyLoRA that an adapter is.

    Raises:
        UnsupportedError: if it is another kind of adapter.
    """
    tiny = carried(adapter)
    if tiny is None:
        raise UnsupportedError(_PROJECT)
    return tiny
