"""Directives for tables that are printed from the data that the program works with."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from adapterkit_cli.tables import LISTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sphinx.application import Sphinx


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> nodes.table:
    """Return a table of plain text."""
    body = nodes.tbody("", *(_row(cells) for cells in rows))
    columns = [nodes.colspec(colwidth=1) for _ in header]
    group = nodes.tgroup("", *columns, nodes.thead("", _row(header)), body, cols=len(header))
    return nodes.table("", group)


def _row(cells: Sequence[str]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph(text=cell)) for cell in cells))


class Listing(SphinxDirective):
    """What `adapterkit list KIND` prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        listing = LISTINGS[self.arguments[0]]
        return [table(listing.header, [listing.cells(row) for row in listing.rows()])]


class ExitCodes(SphinxDirective):
    """Every exception and its exit code."""

    def run(self) -> list[nodes.Node]:
        from adapterkit import errors

        kinds = [
            value
            for value in vars(errors).values()
            if isinstance(value, type) and issubclass(value, errors.AdapterKitError)
        ]
        kinds.sort(key=lambda kind: kind.exit_code)
        rows = [
            (str(k.exit_code), k.__name__, (k.__doc__ or "").split("\n", maxsplit=1)[0])
            for k in kinds
        ]
        return [table(("exit code", "exception", "meaning"), rows)]


class Keys(SphinxDirective):
    """The fields of a report, which are the keys of its JSON."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        import adapterkit

        kind = getattr(adapterkit, self.arguments[0])
        told = _attributes(kind.__doc__ or "")
        for parent in kind.__mro__[1:]:
            told = {**_attributes(parent.__doc__ or ""), **told}
        rows = [(each.name, str(each.type), told.get(each.name, "")) for each in fields(kind)]
        return [table(("key", "type", "meaning"), rows)]


def _attributes(text: str) -> dict[str, str]:
    """Return what the `Attributes:` of a docstring say of each name."""
    found: dict[str, str] = {}
    name = ""
    for line in text.partition("Attributes:")[2].splitlines():
        if line.startswith(" " * 8) and not line.startswith(" " * 9) and ": " in line:
            name, _, said = line.strip().partition(": ")
            found[name] = said
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def as_restructured_text(
    _app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Turn the backticks and stars of docstrings, those of Markdown, into what Sphinx reads."""
    parts = re.split(r"`([^`]+)`", "\n".join(lines))
    text = re.sub(r"([*|])", r"\\\1", parts[0])
    for literal, after in zip(parts[1::2], parts[2::2], strict=True):
        # A literal ends before a letter only where an escaped blank says so: `Note`s.
        joint = "\\ " if after[:1].isalnum() else ""
        text += f"``{literal}``{joint}" + re.sub(r"([*|])", r"\\\1", after)
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directives."""
    # Before napoleon, which comes at 500.
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.add_directive("adapterkit-list", Listing)
    app.add_directive("adapterkit-exit-codes", ExitCodes)
    app.add_directive("adapterkit-keys", Keys)
    return {"parallel_read_safe": True}
