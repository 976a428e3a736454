"""What each way in imports: start-up time is counted in modules, not in seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "fixtures" / "peft" / "tiny")
BASE = str(ROOT / "fixtures" / "peft" / "base")
PIRATE = str(ROOT / "fixtures" / "pirate" / "adapter")

TORCH = {"torch", "transformers", "peft", "huggingface_hub", "xllamacpp"}
NUMBERS = {"numpy", "ml_dtypes", "gguf", "rich", "importlib.metadata"}
RUN = """
import json, sys
from contextlib import redirect_stdout, suppress
with suppress(SystemExit), redirect_stdout(sys.stderr):
    {statement}
print(json.dumps(sorted(sys.modules)))
"""


def imported(statement: str, folder: Path) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(statement=statement)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(json.loads(done.stdout))


def command(*arguments: str) -> str:
    return f"from adapterkit_cli.main import cli; cli.main({list(arguments)!r})"


def test_the_package_alone_imports_nothing_of_its_own(tmp_path: Path) -> None:
    modules = imported("import adapterkit", tmp_path)
    assert {name for name in modules if name.startswith("adapterkit")} == {"adapterkit"}
    assert not modules & (NUMBERS | TORCH | {"click"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert", "--help"]])
def test_help_imports_no_numbers(arguments: list[str], tmp_path: Path) -> None:
    modules = imported(command(*arguments), tmp_path)
    assert "adapterkit_cli.main" in modules
    assert not modules & (NUMBERS | TORCH | {"pathlib", "statistics"})
    assert not {name for name in modules if name.startswith("adapterkit.formats")}


def test_a_command_imports_no_other_command(tmp_path: Path) -> None:
    modules = imported(command("list", "formats"), tmp_path)
    assert "adapterkit_cli.tables" in modules
    assert not modules & {"adapterkit_cli.convert", "adapterkit_cli.inspect", "adapterkit_cli.diff"}


@pytest.mark.parametrize("name", ["formats", "families", "engines", "methods", "codes"])
def test_tables_import_no_numbers(name: str, tmp_path: Path) -> None:
    modules = imported(command("list", name), tmp_path)
    assert "adapterkit_cli.tables" in modules
    # Formats may come from other packages: importlib.metadata finds them.
    assert not modules & ((NUMBERS | TORCH) - {"importlib.metadata"})


def test_inspect_decodes_nothing(tmp_path: Path) -> None:
    made = str(tmp_path / "tiny.gguf")
    imported(command("convert", TINY, "-o", made, "--base", BASE), tmp_path)
    modules = imported(command("inspect", made), tmp_path)
    assert "adapterkit.formats.gguf.reader" in modules
    assert not modules & (NUMBERS | TORCH)
    # The safetensors library imports numpy to open a file; nothing here asks for it.
    modules = imported(command("inspect", PIRATE), tmp_path)
    assert "safetensors" in modules
    assert not modules & ((NUMBERS | TORCH) - {"numpy"})
    rooms = {name.split(".")[1] for name in modules if name.startswith("adapterkit.")}
    assert not rooms & {"architectures", "lowrank", "passes", "saving"}


@pytest.mark.parametrize("outtype", ["auto", "bf16"])
def test_nothing_imports_torch(outtype: str, tmp_path: Path) -> None:
    made = str(tmp_path / "tiny.gguf")
    modules = imported(
        command("convert", TINY, "-o", made, "--base", BASE, "--outtype", outtype), tmp_path
    )
    assert Path(made).is_file()
    assert not modules & TORCH
    assert not {name for name in modules if name.startswith("adapterkit.engines")}
    assert not imported(command("diff", TINY, made, "--base", BASE), tmp_path) & TORCH


def test_an_audit_imports_what_it_measures_with(tmp_path: Path) -> None:
    modules = imported(command("audit", PIRATE), tmp_path)
    assert "adapterkit.auditing.measure" in modules
    assert not modules & TORCH
    charts = {name for name in modules if name.startswith("adapterkit.auditing.html")}
    others = {"pairwise", "plan", "reference_bank", "against_base", "base_sites"}
    assert not modules & (charts | {f"adapterkit.auditing.{name}" for name in others})
    assert not modules & {
        "adapterkit.conversion",
        "adapterkit.containers.torch_zip",
        "numpy.ma",
        "rich",
    }
