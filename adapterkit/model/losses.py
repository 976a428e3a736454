"""Losses that do not depend on the format which has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.model.adapter import SETTINGS
from adapterkit.notes import Loss, first_and_more

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.model.adapter import AdapterTensorSet


def lost_settings(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Name every setting, for a format that holds none of them; nothing can be dropped."""
    for field, shown in SETTINGS.items():
        if getattr(adapter, field):
            setting = f"{shown} = {adapter.settings[shown]!r}"
            yield Loss(field.replace("_", "-"), setting, "has no place in this format")
    if adapter.engine_layout:
        message = "its rows are in llama.cpp's order; give the base model with --base"
        yield Loss("engine-layout", first_and_more(list(adapter.engine_layout)), message)


def lost_metadata(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Say that free text is left out, which changes nothing that an adapter does."""
    if adapter.metadata:
        names = first_and_more(list(adapter.metadata))
        yield Loss("metadata", names, "free text of the source is left out", blocks=False)
