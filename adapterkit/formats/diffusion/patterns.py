"""Names with numbers in them, found by their shape: no name is tried against every pattern."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_T = TypeVar("_T")
_NUMBER = re.compile(r"[0-9]+")
_TOKEN = re.compile(r"\{\w\}|[0-9]+")
_GAP = re.compile(r"\{(\w)\}")


class Index(Generic[_T]):
    """What patterns such as `blocks.{i}.mlp.0` stand for; `{i}` is any number, 0 is itself."""

    def __init__(self, patterns: Iterable[tuple[str, _T]]) -> None:
        self._rows: dict[str, list[tuple[tuple[str, ...], _T]]] = defaultdict(list)
        for pattern, value in patterns:
            tokens = tuple(_TOKEN.findall(pattern))
            self._rows[shape(pattern)].append((tokens, value))

    def find(self, name: str) -> tuple[_T, Mapping[str, str]] | None:
        """Return what a name stands for and the numbers in it, or None."""
        rows = self._rows.get(shape(name), ())
        numbers = _NUMBER.findall(name) if rows else []
        for tokens, value in rows:
            bound: dict[str, str] = {}
            for token, number in zip(tokens, numbers, strict=True):
                wanted = bound.setdefault(token[1], number) if token[0] == "{" else token
                if wanted != number:
                    break
            else:
                return value, bound
        return None


def shape(name: str) -> str:
    """Return a name or pattern without its numbers, the same for all that differ in them alone."""
    return _TOKEN.sub("#", name)


def filled(pattern: str, numbers: Mapping[str, str]) -> str:
    """Return a pattern with its numbers put in."""
    return _GAP.sub(lambda gap: numbers[gap[1]], pattern)


def underscored(path: str) -> str:
    """Return a path as kohya's trainers write it; only a table undoes that."""
    return path.replace(".", "_")
