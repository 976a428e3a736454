"""How results look: JSON for programs, aligned columns for people.

`click.echo` takes the colour out unless it writes to a terminal: the text is the same everywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

import click

SCHEMA = 1
_GAP = "  "
_THREE_DIGITS = 999.5  # what is not less is rounded to four


def emit_json(result: Mapping[str, object] | object) -> None:
    """Write one JSON object on one line, `schema` first; what is not finite becomes null."""
    content = cast("dict[str, Any]", plain(result))
    # ASCII only: names in files may hold anything, half surrogate pairs too.
    emit(json.dumps({"schema": SCHEMA, **content}, allow_nan=False))


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
    """Write something beside the data, such as a note, to stderr."""
    click.echo(click.style(f"{kind}: ", bold=True) + printable(text), err=True)


def remarks(kind: str, texts: Iterable[str]) -> None:
    """Write several of a kind."""
    for text in texts:
        remark(kind, text)


def printable(text: str) -> str:
    """Return text from a file with its control characters escaped: it cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def columns(rows: Sequence[Sequence[str]], *, header: Sequence[str] = ()) -> str:
    """Return rows aligned on the left; the last column may be as long as it likes."""
    cells = [[printable(cell) for cell in row] for row in (*([header] if header else []), *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    if header:
        lines[0] = click.style(lines[0], bold=True)
    return "\n".join(lines)


def sheet(entries: Sequence[tuple[str, str]]) -> str:
    """Return names and values, one below the other; entries without a value are left out."""
    shown = [(name, printable(value)) for name, value in entries if value]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(
        click.style(name.ljust(width), bold=True) + _GAP + text for name, text in shown
    )


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
