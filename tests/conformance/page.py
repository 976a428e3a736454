"""docs/traits.md is the table: run this file with Python to write it anew."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from conformance.commands import COMMANDS
from conformance.table import Cell, Trait, known, traits

PAGE = Path(__file__).parents[2] / "docs" / "traits.md"

_GROUPS = {
    "Reading": ("inspect", "validate", "diff", "audit"),
    "Converting": ("to-peft", "to-gguf", "to-mlx", "to-onnx-adapter", "to-tinylora"),
    "Converting for diffusion models": ("to-kohya", "to-diffusers", "to-comfyui"),
    "Merging": ("merge", "into-hf", "into-gguf", "compress", "extract"),
    "Serving": ("stack", "serve", "project"),
}
_HEAD = """# What each command does with what adapters have

Every cell is a test: the adapter is made with PEFT, the command is run, and what it wrote is loaded
by the program that it is for and held against PEFT's live model.

- **exact**: what is written means what the adapter means to PEFT.
- **refused**: exit code 3 or 4, nothing is written, and the message names the reason.
- **loss**: refused likewise; with `--allow-lossy` it is left out and listed, and the rest is exact.
- **told**: the command reads only; its exit code is in parentheses, and it names the trait.
- A cell in *italics* is what is right and not so yet.

This page is written by tests/conformance/page.py from tests/conformance/traits.toml.
"""


def page() -> str:
    """Return the page as text."""
    return "\n".join([_HEAD, *(_group(title, names) for title, names in _GROUPS.items())])


def _group(title: str, names: tuple[str, ...]) -> str:
    lines = {command.name: command for command in COMMANDS}
    head = ["the adapter has", *(lines[name].title for name in names)]
    rows = [head, ["---"] * len(head)]
    reasons: list[str] = []
    rows += [[t.title, *(_shown(t, name, reasons) for name in names)] for t in traits().values()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    typed = "\n".join(f"- {lines[name].title}: `{lines[name].line}`" for name in names)
    notes = "\n".join(f"{place}. {reason}" for place, reason in enumerate(reasons, 1))
    return f"## {title}\n\n{typed}\n\n{table}\n" + (f"\n{notes}\n" if notes else "")


def _shown(trait: Trait, name: str, reasons: list[str]) -> str:
    cell = trait.cells[name]
    text = _text(cell, reasons)
    return f"*{text}*" if f"{trait.name}/{name}" in known() else text


def _text(cell: Cell, reasons: list[str]) -> str:
    if cell.kind == "told":
        return f"told ({cell.status})"
    if cell.kind != "-":
        return cell.kind
    if cell.word not in reasons:
        reasons.append(cell.word)
    return f"- ({reasons.index(cell.word) + 1})"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
