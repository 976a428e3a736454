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
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import click

from adapterkit_cli import manner

SCHEMA = 2
_GAP = "  "
_THREE_DIGITS = 999.5  # what is not less is rounded to four
# The narrowest that a column is folded to.
_NARROW = 8
_COLOURS = {"error": "red", "unchecked": "magenta", "warning": "yellow", "dropped": "yellow"}
_COLOURS |= {"note": "cyan", "unreadable": "red"}
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


def emit(text: str) -> None:
    """Write data to stdout."""
    click.echo(text)


def remark(kind: str, text: str) -> None:
    """Write something beside the data, such as a note, to stderr; --quiet leaves notes out."""
    if not (kind == "note" and manner.quiet()):
        click.echo(coloured(f"{kind}: ") + printable(text), err=True)


def remarks(kind: str, texts: Iterable[str]) -> None:
    """Write several of a kind."""
    for text in texts:
        remark(kind, text)


def coloured(text: str) -> str:
    """Return text in the colour of the severity that it begins with."""
    return click.style(text, fg=_COLOURS.get(re.split("[: ]", text, maxsplit=1)[0]), bold=True)


def shown(items: Sequence[_Item], limit: int) -> Sequence[_Item]:
    """Return the first of many, or all of them where --verbose asks for it."""
    return items if manner.verbose() else items[:limit]


def printable(text: str) -> str:
    """Return text from a file with its control characters escaped: it cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def columns(rows: Sequence[Sequence[str]], *, header: Sequence[str] = ()) -> str:
    """Return rows aligned on the left; on a terminal, cells that are too long are folded."""
    cells = [[printable(cell) for cell in row] for row in (*([header] if header else []), *rows)]
    widths = _fitted([max(map(len, column)) for column in zip(*cells, strict=True)])
    lines: list[str] = []
    for place, row in enumerate(cells):
        folded = [_folded(cell, width) for cell, width in zip(row, widths, strict=True)]
        for level in range(max(map(len, folded), default=0)):
            parts = [part[level] if level < len(part) else "" for part in folded]
            line = _GAP.join(p.ljust(w) for p, w in zip(parts, widths, strict=True)).rstrip()
            lines.append(click.style(line, bold=True) if header and place == 0 else line)
    return "\n".join(lines)


def _fitted(widths: list[int]) -> list[int]:
    """Return the widths of columns that fit a terminal: the widest give way; whole for programs."""
    if not sys.stdout.isatty():
        return widths
    room = shutil.get_terminal_size().columns - len(_GAP) * (len(widths) - 1)
    fitted = list(widths)
    while sum(fitted) > room and max(fitted, default=0) > _NARROW:
        fitted[fitted.index(max(fitted))] -= 1
    return fitted


def _folded(cell: str, width: int) -> list[str]:
    return [cell] if len(cell) <= width else textwrap.wrap(cell, max(width, 1)) or [cell]


def sheet(entries: Sequence[tuple[str, str]]) -> str:
    """Return names and values, one below the other; entries without a value are left out."""
    said = [(name, printable(value)) for name, value in entries if value]
    width = max((len(name) for name, _ in said), default=0)
    return "\n".join(click.style(name.ljust(width), bold=True) + _GAP + text for name, text in said)


def count(number: int, noun: str) -> str:
    """Return `1 module` or `1,024 modules`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(number: int) -> str:
    """Return a number of bytes in three digits: `936 kB`, `83.9 MB`."""
    value, unit = float(number), "bytes"
    for larger in ("kB", "MB", "GB"):
        if value < _THREE_DIGITS:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < _THREE_DIGITS else f"{value:,.0f} {unit}"


def short(number: float | None) -> str:
    """Return a measured number in three digits, or a dash where there is none."""
    return "-" if number is None else f"{number:.3g}"
