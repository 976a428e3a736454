"""A report as one self-contained HTML page, which asks for nothing from anywhere."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias

from adapterkit.destination import check_report
from adapterkit.output import staged

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_HEADING = re.compile(r"<(h[12])>(.*?)</h[12]>", re.DOTALL)
_NUMBERS = re.compile(r"(\d+)")
# Headings that a list of contents is worth.
_SEVERAL = 3
# What stands in a table: text, or the text of a number and the number itself.
Cell: TypeAlias = str | tuple[str, float | None]


def shown(text: str) -> str:
    """Return text from a file as HTML text: escaped, control and direction marks as spaces."""
    return html.escape("".join(c if c.isprintable() else " " for c in text), quote=True)


def natural(name: str) -> tuple[tuple[str, int], ...]:
    """Return what sorts names as people do: layer 2 before layer 10."""
    return tuple(
        ("", int(part)) if part.isdecimal() else (part, 0) for part in _NUMBERS.split(name)
    )


def page(title: str, body: str, *, data: str = "") -> str:
    """Return a whole page; its policy forbids it to load anything.

    Args:
        title: what it is about, as plain text.
        body: HTML; every h1 and h2 becomes an entry of the contents.
        data: HTML that the page's script reads.
    """
    here = Path(__file__)
    style = here.with_name("page.css").read_text(encoding="utf-8")
    script = here.with_name("page.js").read_text(encoding="utf-8")
    contents, body = _with_contents(body)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{shown(title)}</title><style>{style}</style></head><body>{contents}{body}"
        f"<footer>{_made()}</footer>{data}<script>{script}</script></body></html>\n"
    )


def _made() -> str:
    version = sys.modules["adapterkit"].__version__
    today = datetime.now(UTC).date().isoformat()
    return f'made by adapterkit {version} on <time datetime="{today}">{today}</time>'


def _with_contents(body: str) -> tuple[str, str]:
    """Return a list of contents, and the body with the places that it leads to."""
    entries: list[str] = []

    def anchored(found: re.Match[str]) -> str:
        level, text = found.groups()
        name = f"part-{len(entries) + 1}"
        words = re.sub(r"<[^>]*>", "", text)
        entries.append(f'<li class="{level}"><a href="#{name}">{words}</a></li>')
        return f'<{level} id="{name}">{text}</{level}>'

    body = _HEADING.sub(anchored, body)
    if len(entries) < _SEVERAL:
        return "", body
    listed = "".join(entries)
    return f'<details class="contents"><summary>Contents</summary><ol>{listed}</ol></details>', body


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return a table that can be sorted; a cell (text, number) is sorted by its number."""
    cells = list(rows)
    # A column of words stands on the left, its header too.
    words = [isinstance(cell, str) for cell in cells[0]] if cells else []
    head = "".join(
        f'<th scope="col"{" class=words" if word else ""}>'
        f'<button type="button">{shown(name)}</button></th>'
        for name, word in zip_longest(header, words)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in cells)
    return scrolled(
        f'<table class="list sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
        tall=True,
    )


def _cell(value: Cell) -> str:
    if isinstance(value, tuple):
        text, number = value
        exact = "" if number is None else f"{number:.6g}"
        return f"<td>{text}</td>" if text == exact else f'<td data-v="{exact}">{shown(text)}</td>'
    return f'<td class="words">{shown(value)}</td>'


def scrolled(content: str, *, tall: bool = False) -> str:
    """Return something wide in a box that scrolls, with a hint where it does."""
    kind = "scroll tall" if tall else "scroll"
    return (
        f'<div class="{kind}" tabindex="0">{content}</div>'
        '<p class="hint" hidden>scroll sideways for more columns</p>'
    )


def copied(text: str, name: str) -> str:
    """Return text in a box with a button that copies it."""
    lines = "\n".join(map(shown, text.split("\n")))
    return (
        f'<p><button type="button" class="copy" data-copy="{name}">Copy</button></p>'
        f'<div class="scroll tall" tabindex="0"><code id="{name}">{lines}</code></div>'
    )


def check_page(destination: Path | str, *, force: bool = False) -> None:
    """Raise now what `write_page` would raise first."""
    check_report(Path(destination), what="page", begins=b"<!doctype html", force=force)


def write_page(text: str, destination: Path | str, *, force: bool = False) -> None:
    """Write a page.

    Args:
        text: the whole page.
        destination: file to create.
        force: replace a page that is there.

    Raises:
        DestinationExistsError: if there is something at the destination that is no page, or
            `force` is false.
        WriteError: if it cannot be written.
    """
    check_page(destination, force=force)
    with staged(Path(destination), force=force) as staging:
        staging.write_text(text, encoding="utf-8")
