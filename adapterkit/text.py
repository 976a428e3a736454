"""What people read: aligned columns, numbers in three digits, reports as text and as rows.

Text is plain unless a `Pen` says otherwise: the command line has one for terminals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, ClassVar, TypeVar, cast, get_args, get_type_hints

_GAP = "  "
_THREE_DIGITS = 999.5  # what is not less is rounded to four
# The narrowest that a column is folded to.
_NARROW = 8
# After a dot, a slash, a dash, an underscore; before the capital of a new word.
_JOINTS = re.compile(r"(?<=[./_-])(?=.)|(?<=[a-z0-9])(?=[A-Z])")
_Item = TypeVar("_Item")


def _as_it_is(text: str) -> str:
    return text


@dataclass(frozen=True, slots=True)
class Pen:
    """How text is written.

    Attributes:
        bold: makes a name or a header stand out.
        severity: colours a text by the severity that it begins with.
        width: columns of the terminal that tables are folded to; None for whole tables.
        whole: whether lists are shown whole.
        brief: whether notes are left out.
    """

    bold: Callable[[str], str] = _as_it_is
    severity: Callable[[str], str] = _as_it_is
    width: int | None = None
    whole: bool = False
    brief: bool = False

    def shown(self, items: Sequence[_Item], limit: int) -> Sequence[_Item]:
        """Return the first of many, or all of them where they are asked for."""
        return items if self.whole else items[:limit]


PLAIN = Pen()


class Shown:
    """A report: `str` is what the command line prints, `repr` its first line, a table its rows."""

    __slots__ = ()
    # The field whose entries are the rows of its table; without one the report is its own row.
    _entries: ClassVar[str] = ""
    # The fields of the report that stand before those of every entry.
    _before: ClassVar[tuple[str, ...]] = ()
    # The function of report and pen that writes its text, as module:function, if it is no method.
    _view: ClassVar[str] = ""

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what people read."""
        module, _, name = self._view.partition(":")
        return getattr(import_module(module), name)(self, pen)

    def rows(self) -> list[dict[str, Any]]:
        """Return the report as rows of a table, one for each thing that it is about."""
        entries: Sequence[Any] = getattr(self, self._entries) if self._entries else [self]
        before = {name: getattr(self, name) for name in self._before}
        return [
            before | {each.name: getattr(entry, each.name) for each in fields(entry)}
            for entry in entries
        ]

    def remarks(self) -> list[tuple[str, str]]:
        """Return what is said beside the text: `warning`, `note` or `dropped`, and a sentence."""
        told = [
            (kind, words)
            for kind, name in (("warning", "warnings"), ("note", "notes"))
            for words in getattr(self, name, ())
        ]
        lost = getattr(self, "losses", ())
        return [*told, *(("dropped", f"{loss.subject}: {loss.message}") for loss in lost)]

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame.

        Raises:
            UnsupportedError: if pandas is not installed.
        """
        return _library("pandas").DataFrame(self.rows(), columns=self._columns())

    def to_polars(self) -> Any:
        """Return the rows as a polars DataFrame.

        Raises:
            UnsupportedError: if polars is not installed.
        """
        rows = [{name: _flat(value) for name, value in row.items()} for row in self.rows()]
        if not rows:
            return _library("polars").DataFrame(schema=self._columns())
        return _library("polars").DataFrame(rows, infer_schema_length=None)

    def _columns(self) -> list[str] | None:
        """Return the names of the columns, which a table without rows has too."""
        if not self._entries or type(self).rows is not Shown.rows:
            return None
        entry = get_args(get_type_hints(type(self))[self._entries])[0]
        return [*self._before, *(each.name for each in fields(entry))]

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        first = next(filter(None, self.text().split("\n")), "")
        return f"<{type(self).__name__}: {re.sub(_GAP + '+', _GAP, first)}>"

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(self.text())}</pre>"


def _flat(value: Any) -> Any:
    """Return a value as Arrow's types have it: names of fields are text."""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {str(name): _flat(item) for name, item in items}
    return value


def _library(name: str) -> Any:
    from adapterkit.errors import UnsupportedError

    try:
        return import_module(name)
    except ImportError:
        raise UnsupportedError(f"{name} is not installed; .rows() gives dictionaries") from None


def printable(text: str) -> str:
    """Return text from a file with its control characters escaped: it cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def columns(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), pen: Pen = PLAIN) -> str:
    """Return rows aligned on the left; cells are folded where the pen's width asks for it."""
    cells = [[printable(cell) for cell in row] for row in (*([header] if header else []), *rows)]
    widths = _fitted(list(zip(*cells, strict=True)), pen.width)
    lines: list[str] = []
    for place, row in enumerate(cells):
        folded = [_folded(cell, width) for cell, width in zip(row, widths, strict=True)]
        for level in range(max(map(len, folded), default=0)):
            parts = [part[level] if level < len(part) else "" for part in folded]
            line = _GAP.join(p.ljust(w) for p, w in zip(parts, widths, strict=True)).rstrip()
            lines.append(pen.bold(line) if header and place == 0 else line)
    return "\n".join(lines)


def _fitted(table: Sequence[Sequence[str]], width: int | None) -> list[int]:
    """Return the widths of columns that fit: the widest give way, words only where they must."""
    fitted = [max(map(len, column)) for column in table]
    if width is None:
        return fitted
    room = width - len(_GAP) * (len(fitted) - 1)
    narrow = [min(size, _NARROW) for size in fitted]
    words = [
        max(len(word) for cell in column for word in cell.split() or ["-"]) for column in table
    ]
    whole = [max(pair) for pair in zip(narrow, words, strict=True)]
    for least in (whole, narrow):
        loose: list[int] = [n for n, size in enumerate(fitted) if size > least[n]]
        while sum(fitted) > room and loose:
            widest = max(loose, key=fitted.__getitem__)
            fitted[widest] -= 1
            loose = [n for n in loose if fitted[n] > least[n]]
    return fitted


def _folded(cell: str, width: int) -> list[str]:
    """Return the lines of a cell; a word that is too long is parted where its parts meet."""
    if len(cell) <= width:
        return [cell]
    lines = [""]
    for word in cell.split():
        for place, part in enumerate(_parted(word, max(width, 1))):
            gap = " " if lines[-1] and place == 0 else ""
            if len(lines[-1]) + len(gap) + len(part) <= width:
                lines[-1] += gap + part
            else:
                lines.append(part)
    return [line for line in lines if line] or [cell]


def _parted(word: str, width: int) -> list[str]:
    """Return the parts of a word: of a path its names, of a class its words, of others no less."""
    if len(word) <= width:
        return [word]
    parts = _JOINTS.split(word)
    return [part[n : n + width] for part in parts for n in range(0, len(part), width)]


def sheet(entries: Iterable[tuple[str, str]], *, pen: Pen = PLAIN) -> str:
    """Return names and values, one below the other; entries without a value are left out."""
    said = [(name, printable(value)) for name, value in entries if value]
    width = max((len(name) for name, _ in said), default=0)
    return "\n".join(pen.bold(name.ljust(width)) + _GAP + value for name, value in said)


def spread(counts: Mapping[Any, int], total: int, *, always: bool = False) -> str:
    """Return `8`, or `8 (30), 16 (30)` where the value is not the same everywhere."""
    names = {_name(value): number for value, number in counts.items()}
    if len(names) == 1 and sum(names.values()) == total and not always:
        return next(iter(names))
    return ", ".join(f"{name} ({number:,})" for name, number in names.items())


def _name(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def from_here(path: str) -> str:
    """Return a path as it is called from the working directory, if it lies there."""
    from pathlib import Path

    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def line(*facts: str) -> str:
    """Return facts side by side; what is empty is left out."""
    return _GAP.join(printable(fact) for fact in facts if fact)


def span(noun: str, numbers: Iterable[int]) -> str:
    """Return `rank 8`, or `ranks 4 to 16` where they are not all the same."""
    found = sorted(set(numbers))
    return f"{noun} {found[0]}" if len(found) == 1 else f"{noun}s {found[0]} to {found[-1]}"


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
