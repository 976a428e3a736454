"""Weights that a class puts together from stored tensors, or cuts out of one, when it is loaded.

The facts are data that fixtures/classes/assemblies.py generates from transformers' own reversal.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.tensor import LazyTensor

_DATA = Path(__file__).parent / "assemblies.json"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")
_WEIGHT = ".weight"
_KINDS = frozenset({"rows", "experts", "joined"})


@dataclass(frozen=True, slots=True)
class Assembly:
    """What a module's weight is made of.

    Attributes:
        kind: `rows` of one tensor, the tensors of single `experts`, or tensors `joined` one below
            the other; else what the class does with the stored tensor, which is none of these.
        names: of the stored tensors, those of the first expert first.
        position: of `rows`, which of the equal parts it is.
        parts: of `rows`, how many there are; of others, how many tensors are below one another.
    """

    kind: str
    names: tuple[str, ...]
    position: int
    parts: int

    @property
    def known(self) -> bool:
        """Whether the stored tensors are the weight, in parts."""
        return self.kind in _KINDS

    def rows(self, stored: LazyTensor) -> LazyTensor:
        """Return the part of one stored tensor that is the weight, (out, in)."""
        height = stored.shape[0] // self.parts
        return stored.rows(self.position * height, (self.position + 1) * height)

    def experts(self) -> list[tuple[str, ...]]:
        """Return the tensors of each expert, or of the only matrix."""
        step = self.parts
        return [self.names[at : at + step] for at in range(0, len(self.names), step)]


def assemblies(classes: Iterable[str], stored: Iterable[str]) -> dict[str, Assembly]:
    """Return the assemblies of a checkpoint's modules, by their paths in memory.

    Args:
        classes: of the model, as its config names them.
        stored: names of the checkpoint's tensors.
    """
    table = next(filter(None, map(_table, classes)), None)
    if not table:
        return {}
    # (parameter, spelling) -> (expert, part) -> stored name
    found: defaultdict[tuple[str, int], dict[tuple[int, int], str]] = defaultdict(dict)
    rows: dict[str, Sequence[Any]] = {}
    for name in stored:
        numbers = _NUMBER.findall(name)
        for parameter, spelling, part, place in table.places.get(_NUMBER.sub("N", name), ()):
            rest = [n for at, n in enumerate(numbers) if at != place]
            if parameter.split(".").count("N") == len(rest):
                path = _filled(parameter, rest)
                expert = 0 if place is None else int(numbers[place])
                found[path, spelling][expert, part] = name
                rows[path] = table.rows[parameter]
    made: dict[str, Assembly] = {}
    for (path, spelling), tensors in sorted(found.items()):
        kind, position, parts, *spellings = rows[path]
        below = len(spellings[spelling])
        if len(tensors) != (1 + max(expert for expert, _ in tensors)) * below:
            continue
        names = tuple(tensors[place] for place in sorted(tensors))
        count = parts if kind == "rows" else below
        made.setdefault(path.removesuffix(_WEIGHT), Assembly(kind, names, position, count))
    return made


@dataclass(frozen=True, slots=True)
class _Table:
    """The rows of a class, and stored names -> (parameter, spelling, part, place of the expert)."""

    rows: Mapping[str, Sequence[Any]]
    places: Mapping[str, Sequence[tuple[str, int, int, int | None]]]


@cache
def _table(name: str) -> _Table | None:
    data = _data()
    if name not in data["classes"]:
        return None
    rows: Mapping[str, Sequence[Any]] = data["tables"][data["classes"][name]]
    places: defaultdict[str, list[tuple[str, int, int, int | None]]] = defaultdict(list)
    for parameter, (_, _, _, *spellings) in rows.items():
        for spelling, names in enumerate(spellings):
            for part, stored in enumerate(names):
                numbers = [each for each in stored.split(".") if each in {"N", "E"}]
                place = numbers.index("E") if "E" in numbers else None
                key = ".".join("N" if each == "E" else each for each in stored.split("."))
                places[key].append((parameter, spelling, part, place))
    return _Table(rows, places)


def _filled(parameter: str, numbers: Sequence[str]) -> str:
    left = iter(numbers)
    return ".".join(next(left) if part == "N" else part for part in parameter.split("."))


@cache
def _data() -> Mapping[str, Any]:
    return json.loads(_DATA.read_text(encoding="utf-8"))
