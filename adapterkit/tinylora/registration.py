"""The order in which a model registers its modules: PEFT's numbers depend on it, no file has it."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adapterkit.architectures import Architecture

_TABLE = Path(__file__).with_name("registration.toml")


def known_families() -> tuple[str, ...]:
    """Return the families whose order is known."""
    return tuple(_orders())


def registered(names: Iterable[str], architecture: Architecture) -> list[str] | None:
    """Sort modules as transformers registers them; None if the family or a module is unknown."""
    order = _orders().get(architecture.name)
    if order is None:
        return None
    places = {path: place for place, path in enumerate(order)}
    first = min(place for path, place in places.items() if "{i}" in path)
    keyed: list[tuple[tuple[int, int, int], str]] = []
    for name in names:
        match = find_rule(architecture, name)
        if match is None or match.rule.hf not in places:
            return None
        place = places[match.rule.hf]
        inside = match.layer is not None
        keyed.append(((first, match.layer or 0, place) if inside else (place, 0, 0), name))
    return [name for _, name in sorted(keyed)]


@cache
def _orders() -> Mapping[str, tuple[str, ...]]:
    data = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return {family: tuple(data["orders"][name]) for family, name in data["families"].items()}
