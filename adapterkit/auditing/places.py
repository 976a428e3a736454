"""Which layer and which family a module belongs to, by its name, for any model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_ANY = "*"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module sits.

    Attributes:
        stack: path of the list of layers, `model.layers`; empty outside of layers.
        layer: number within the stack; None outside of layers.
        family: the name with every number as `*`: `model.layers.*.self_attn.q_proj`.
    """

    stack: str
    layer: int | None
    family: str


def place_of(module: str) -> Place:
    """Return where a module sits; the first number in its name is the layer."""
    parts = module.split(".")
    family = ".".join(_ANY if part.isdecimal() else part for part in parts)
    for index, part in enumerate(parts):
        if part.isdecimal():
            return Place(".".join(parts[:index]), int(part), family)
    return Place("", None, family)


def short_names(families: Iterable[str]) -> dict[str, str]:
    """Return each family's name without its stack, where that stays unique."""
    names = dict.fromkeys(families)
    short = {name: name.partition(f".{_ANY}.")[2] or name for name in names}
    counts = list(short.values())
    return {name: brief if counts.count(brief) == 1 else name for name, brief in short.items()}
