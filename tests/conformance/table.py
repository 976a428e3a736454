"""The table: what is right for every trait and every command, and what is known not to be so."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_FIELDS = ("title", "base", "idle", "tied")
KINDS = ("exact", "refused", "loss", "told", "-")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is right for a trait and a command.

    Attributes:
        kind: one of KINDS.
        word: what must be said, a regular expression; the reason where nothing applies.
        status: exit code of what is told.
    """

    kind: str
    word: str = ""
    status: int = 0


@dataclass(frozen=True, kw_only=True)
class Trait:
    """A row of the table.

    Attributes:
        name: id in the tests.
        title: as the docs have it.
        base: name of its base.
        idle: whether the adapter changes nothing.
        tied: what merging into a base with a tied output is told.
        cells: command -> what is right.
    """

    name: str
    title: str
    base: str
    idle: bool
    tied: str | None
    cells: dict[str, Cell]


@cache
def traits() -> dict[str, Trait]:
    """Return every row by its name."""
    document = tomllib.loads((_HERE / "traits.toml").read_text(encoding="utf-8"))
    return {name: _trait(name, row) for name, row in document.items()}


@cache
def known() -> dict[str, str]:
    """Return `trait/command` -> why the cell does not hold yet."""
    document = tomllib.loads((_HERE / "known.toml").read_text(encoding="utf-8"))
    return {
        f"{trait}/{command}": reason
        for reason, rows in document.items()
        for trait, commands in rows.items()
        for command in commands
    }


def _trait(name: str, row: dict[str, Any]) -> Trait:
    cells = {key: _cell(text) for key, text in row.items() if key not in _FIELDS}
    return Trait(
        name=name,
        title=row["title"],
        base=row["base"],
        idle=row.get("idle", False),
        tied=row.get("tied"),
        cells=cells,
    )


def _cell(text: str) -> Cell:
    kind, _, word = text.partition(" ")
    if kind not in KINDS:
        raise ValueError(f"{text!r} is no cell")
    if kind != "told":
        return Cell(kind=kind, word=word)
    status, _, word = word.partition(" ")
    return Cell(kind=kind, word=word, status=int(status))
