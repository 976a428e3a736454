"""What transformers says of a model class: names on disk, tied tables, and what is no Linear.

The facts are data that fixtures/transformers/make.py generates by building every class.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_DATA = Path(__file__).parent / "classes.json"
_FIXED = "#"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Renaming:
    """Names in memory against names on disk, by their longest prefix that is renamed.

    Attributes:
        to_disk: prefix in memory -> prefix on disk, `N` for every number, `#0` for one that the
            path in memory does not have.
        to_memory: the reverse.
    """

    to_disk: Mapping[str, str]
    to_memory: Mapping[str, str]

    def disk(self, name: str) -> str:
        """Return the stored name of a parameter or module of the class."""
        return renamed(name, self.to_disk)

    def memory(self, name: str) -> str:
        """Return the path in the class of a stored parameter or module; itself if it has none."""
        found = renamed(name, self.to_memory)
        return found if self.disk(found) == name else name


@dataclass(frozen=True, slots=True)
class ModelClass:
    """Facts of one transformers class.

    Attributes:
        name: the class.
        model_type: that of its config.
        prefix: what a class with a head puts before the names of its trunk, without the dot.
        tied: parameters in memory that have no tensor of their own -> those whose they share.
        kinds: matrices that are no Linear, without the prefix and with numbers as `N` ->
            `embedding`, `conv1d` (stored as (in, out)), `convolution` or `bare` (a parameter
            without a layer of its own).
        renamings: what a fresh model's names are on disk, then those of one that was loaded from
            older files.
    """

    name: str
    model_type: str
    prefix: str
    tied: Mapping[str, str]
    kinds: Mapping[str, str] = field(repr=False)
    renamings: Sequence[Renaming] = field(repr=False)

    @property
    def headless(self) -> bool:
        """Whether it is the trunk alone, by the convention of its name."""
        return self.name.endswith("Model") and "LMHead" not in self.name

    def kind(self, parameter: str) -> str:
        """Return what holds a matrix, by its path in memory: one of `kinds`, or `linear`."""
        template = _NUMBER.sub("N", parameter).removeprefix(f"{self.prefix}.")
        return self.kinds.get(template, "linear")


@cache
def model_class(name: str) -> ModelClass | None:
    """Return the facts of a class; None for one that transformers does not have."""
    data = _data()
    found = data["classes"].get(name)
    if found is None:
        return None
    kind, prefix, kinds, renamings, tied = found
    return ModelClass(
        name=name,
        model_type=kind,
        prefix=prefix,
        tied=data["tied"][tied],
        kinds={path: what for what, paths in data["kinds"][kinds].items() for path in paths},
        renamings=tuple(Renaming(*data["renamings"][place]) for place in renamings),
    )


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the longest prefix that is listed; the empty one stands for all names.

    Args:
        name: of a parameter or module.
        prefixes: with `N` for any number, and `#0` for one that stands for a name.
    """
    parts = name.split(".")
    numbered = ["N" if part.isdecimal() else part for part in parts]
    fixed = [prefix.split(".") for prefix in prefixes if _FIXED in prefix]
    for length in range(len(parts), -1, -1):
        heads = [head for head in fixed if len(head) == length and _begins(parts, head)]
        for head in (*heads, numbered[:length]):
            if ".".join(head) in prefixes:
                return _filled(prefixes[".".join(head)], head, parts)
    return name


def _begins(parts: Sequence[str], listed: Sequence[str]) -> bool:
    """Tell whether a name begins with a prefix that names a number."""
    return all(
        part == one.removeprefix(_FIXED) or (one == "N" and part.isdecimal())
        for part, one in zip(parts, listed, strict=False)
    )


def _filled(prefix: str, head: Sequence[str], parts: Sequence[str]) -> str:
    """Return a name whose first parts, as they are listed, have become another prefix."""
    numbers = iter([part for part, listed in zip(parts, head, strict=False) if listed == "N"])
    first = [next(numbers, part) if part == "N" else part for part in prefix.split(".")]
    return ".".join(part.removeprefix(_FIXED) for part in (*first, *parts[len(head) :]) if part)


@cache
def _data() -> Mapping[str, Any]:
    return json.loads(_DATA.read_text(encoding="utf-8"))
