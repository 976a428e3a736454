"""How results look: JSON for programs, aligned columns for people.

`click.echo` takes the colour out unless it writes to a terminal: the text is the same everywhere,
but for tables, which are folded to the width of a terminal and left whole for programs.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import click

from adapterkit import text
from adapterkit.text import Pen, Shown, count, printable, short, size
from adapterkit_cli import manner

__all__ = [
    "answer",
    "coloured",
    "columns",
    "count",
    "emit",
    "emit_json",
    "json_line",
    "pen",
    "plain",
    "printable",
    "remark",
    "remarks",
    "sheet",
    "short",
    "show",
    "shown",
    "size",
    "tell",
]

SCHEMA = 2
_COLOURS = {
    "error": "red",
    "unreadable": "red",
    "unchecked": "magenta",
    "warning": "yellow",
    "dropped": "yellow",
    "note": "cyan",
}
_Item = TypeVar("_Item")


def emit_json(result: Mapping[str, object] | object) -> None:
    """Write one JSON object on one line, `schema` first; what is not finite becomes null."""
    content = cast("dict[str, Any]", plain(result))
    emit(json_line({"schema": SCHEMA, **content}))


def json_line(content: Mapping[str, object]) -> str:
    """Return an object on one line; ASCII only: names in files may hold half surrogate pairs."""
    return json.dumps(plain(content), allow_nan=False)


def plain(value: object) -> object:
    """Return a value as JSON knows it: dataclasses and mappings are objects, paths are text."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {str(plain(key)): plain(item) for key, item in items}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in cast("Sequence[object]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def emit(words: str) -> None:
    """Write data to stdout."""
    click.echo(words)


def remark(kind: str, words: str) -> None:
    """Write something beside the data, such as a note, to stderr; --quiet leaves notes out."""
    if not (kind == "note" and manner.quiet()):
        click.echo(coloured(f"{kind}: ") + printable(words), err=True)


def remarks(kind: str, texts: Iterable[str]) -> None:
    """Write several of a kind."""
    for words in texts:
        remark(kind, words)


def show(report: Shown) -> None:
    """Write a report to stdout, and what is said beside it to stderr."""
    emit(report.text(pen()))
    tell(report)


def tell(report: Shown) -> None:
    """Write what a report says beside its text to stderr."""
    for kind, words in report.remarks():
        remark(kind, words)


def answer(report: Shown, *, as_json: bool) -> None:
    """Write a report as the user asked for it."""
    if as_json:
        emit_json(report)
    else:
        show(report)


def coloured(words: str) -> str:
    """Return words in the colour of the severity that it begins with."""
    return click.style(words, fg=_COLOURS.get(re.split("[: ]", words, maxsplit=1)[0]), bold=True)


def shown(items: Sequence[_Item], limit: int) -> Sequence[_Item]:
    """Return the first of many, or all of them where --verbose asks for it."""
    return items if manner.verbose() else items[:limit]


def pen() -> Pen:
    """Return how this command writes: in colour, to the width of the terminal, whole or brief."""
    return Pen(
        bold=lambda words: click.style(words, bold=True),
        severity=coloured,
        width=shutil.get_terminal_size().columns if sys.stdout.isatty() else None,
        whole=manner.verbose(),
        brief=manner.quiet(),
    )


def columns(rows: Sequence[Sequence[str]], *, header: Sequence[str] = ()) -> str:
    """Return rows aligned on the left; on a terminal, cells that are too long are folded."""
    return text.columns(rows, header=header, pen=pen())


def sheet(entries: Sequence[tuple[str, str]]) -> str:
    """Return names and values, one below the other; entries without a value are left out."""
    return text.sheet(entries, pen=pen())
