"""README's tables are the data's: run this file with Python to write them anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adapterkit.architectures import families, load
from adapterkit.registry import formats

README = Path(__file__).parents[2] / "README.md"


def formats_table() -> str:
    rows = ["| format | name | read | write | cannot hold |", "|---|---|---|---|---|"]
    for spec in formats():
        read, write = ("yes" if able else "no" for able in (spec.reads, spec.writes))
        rows.append(f"| {spec.title} | `{spec.name}` | {read} | {write} | {spec.cannot_hold} |")
    return "\n".join(rows)


def families_table() -> str:
    rows = ["| family | Hugging Face classes | GGUF | verified |", "|---|---|---|---|"]
    verified = {"engine": "in llama.cpp", "dense": "dense ΔW", "no": "no"}
    for name in families():
        family = load(name)
        classes = ", ".join(f"`{name}`" for name in family.classes)
        mark = verified[family.verified]
        rows.append(f"| {family.title} | {classes} | `{family.gguf}` | {mark} |")
    return "\n".join(rows)


TABLES = {"formats": formats_table, "families": families_table}


def with_tables(text: str) -> str:
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*<!-- /{name} -->", lambda _: block, text, flags=re.DOTALL)  # noqa: B023
    return text


@pytest.mark.parametrize("name", TABLES)
def test_readme_lists_what_the_data_holds(name: str) -> None:
    assert f"<!-- {name} -->\n{TABLES[name]()}\n<!-- /{name} -->" in README.read_text("utf-8")


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), encoding="utf-8")
