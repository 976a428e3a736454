"""Rows as CSV that any program reads, and that no spreadsheet takes for a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_FORMULA = ("=", "+", "-", "@")


def csv_text(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table; empty cells are null.

    What is in a list is separated by spaces, or by `; ` where it is text; of a mapping, every
    entry is `name:value`. What cannot be printed is written as an escape, and text that a
    spreadsheet would take for a formula has an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(map(_cell, row))
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, object]", value).items()
        return _guarded("; ".join(f"{name}:{each}" for name, each in items))
    if isinstance(value, (tuple, list)):
        listed = cast("Sequence[object]", value)
        if all(isinstance(each, (int, float)) for each in listed):
            return " ".join(map(repr, listed))
        return _guarded("; ".join(map(_said, listed)))
    if isinstance(value, str):
        return _guarded(value)
    return "" if value is None else value


def _said(value: object) -> str:
    """Return what stands for a value in a list: of a mapping, its first value that is text."""
    if isinstance(value, Mapping):
        values = cast("Mapping[Any, object]", value).values()
        return next((each for each in values if isinstance(each, str)), "")
    return str(value)


def _guarded(text: str) -> str:
    flat = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"'{flat}" if flat.lstrip().startswith(_FORMULA) else flat
