"""What is public: complete, typed at run time and for type checkers, and hidden by no module."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import pkgutil
import pydoc
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterkit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMES = sorted(set(adapterkit.__all__) - {"__version__"})
# What numpy's own types are called where numpy is imported by those alone who use it.
# A family of models: what its rows are made of is the grammar of adapterkit/architectures.
TABLES = {"Architecture"}
# Hints of classes resolve with the public names.
LATE: dict[str, Any] = {name: getattr(adapterkit, name) for name in NAMES} | {
    "np": np,
    "Array": np.ndarray,
}


def callables(name: str) -> dict[str, Any]:
    """Return what has a signature: a function, or the methods and properties of a class."""
    thing = getattr(adapterkit, name)
    if not inspect.isclass(thing):
        return {name: thing}
    found: dict[str, Any] = {}
    for part, member in vars(thing).items():
        plain = member.fget if isinstance(member, property) else member
        plain = plain.__func__ if isinstance(plain, (classmethod, staticmethod)) else plain
        if inspect.isfunction(plain) and not part.startswith("_"):
            found[f"{name}.{part}"] = plain
    return found


def named(hint: Any) -> set[type]:
    """Return the project's classes in a resolved annotation."""
    inner = set().union(*map(named, typing.get_args(hint))) if typing.get_args(hint) else set()
    own = inspect.isclass(hint) and hint.__module__.startswith("adapterkit")
    return inner | ({hint} if own else set())


@pytest.mark.parametrize("name", NAMES)
def test_signatures_resolve_and_name_public_types_only(name: str) -> None:
    thing = getattr(adapterkit, name)
    hints = [typing.get_type_hints(each, localns=LATE) for each in callables(name).values()]
    if dataclasses.is_dataclass(thing):
        fields = typing.get_type_hints(thing, localns=LATE)
        hints.append({k: v for k, v in fields.items() if not k.startswith("_")})
    if name in TABLES:
        return
    used = {each for hint in hints for value in hint.values() for each in named(value)}
    assert {each.__qualname__ for each in used} <= set(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if inspect.isfunction(getattr(adapterkit, n))])
def test_functions_resolve_without_help(name: str) -> None:
    assert typing.get_type_hints(getattr(adapterkit, name))


def test_the_stub_says_what_the_package_does() -> None:
    tree = ast.parse((ROOT / "adapterkit" / "__init__.pyi").read_text(encoding="utf-8"))
    stub = {
        alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: f"adapterkit.{home}" for name, home in adapterkit._HOMES.items()}
    assert stub == homes | dict.fromkeys(adapterkit._SUBMODULES, "adapterkit")


def test_every_name_is_there_and_listed() -> None:
    for name in NAMES:
        assert getattr(adapterkit, name) is not None
        assert name in dir(adapterkit)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = adapterkit.nonsense


def test_a_public_module_is_there_without_an_import_of_its_own() -> None:
    program = "import adapterkit; print(adapterkit.torch.__name__, 'torch' in dir(adapterkit))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "adapterkit.torch True\n"


def test_no_module_has_the_name_of_a_public_thing() -> None:
    modules = {module.name for module in pkgutil.iter_modules(adapterkit.__path__)}
    assert modules.isdisjoint(NAMES)
    for name in ("auditing", "conversion", "merging.into", "extraction"):
        assert importlib.import_module(f"adapterkit.{name}").__name__ == f"adapterkit.{name}"


def test_the_help_of_a_function_is_its_own() -> None:
    text = pydoc.plain(pydoc.render_doc("adapterkit.merge_into"))
    assert "Write a copy of" in text or "Merge" in text


PROGRAM = """
from pathlib import Path

import adapterkit
import adapterkit.auditing as auditing
from adapterkit import AdapterTensorSet, ConversionReport, Severity


def main(path: Path) -> list[str]:
    adapter: AdapterTensorSet = adapterkit.read(path)
    report: ConversionReport = adapterkit.convert(path, "out.gguf", base="base", outtype="f16")
    findings = adapterkit.validate(path, targets=["peft"]).findings
    errors = [f.message for f in findings if f.severity is Severity.ERROR]
    merged = adapterkit.merge([adapter, adapter], weights=[0.5, 0.5])
    stack = adapterkit.AdapterStack()
    stack.load(path, scale=0.5)
    state, _ = adapterkit.torch.to_state_dict(adapter)
    errors += [auditing.__name__, report.format, *state]
    return [*errors, str(len(merged.adapter.pairs_by_module()))]
"""


def pyright(program: Path) -> list[str]:
    config = program.with_name("pyrightconfig.json")
    config.write_text(f'{{"typeCheckingMode": "strict", "extraPaths": ["{ROOT}"]}}')
    return [sys.executable, "-m", "basedpyright", "-p", str(config), str(program)]


def mypy(program: Path) -> list[str]:
    strict = ["--strict", "--follow-imports=silent", "--cache-dir", str(program.with_name("cache"))]
    return [sys.executable, "-m", "mypy", *strict, str(program)]


@pytest.mark.parametrize("checker", [pyright, mypy])
def test_a_users_program_passes_a_strict_type_check(
    checker: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("pairs_by_module()", "tensors"), encoding="utf-8")

    def checked() -> subprocess.CompletedProcess[str]:
        where = {**os.environ, "MYPYPATH": str(ROOT)}
        command = checker(program)
        return subprocess.run(command, capture_output=True, text=True, check=False, env=where)

    ran = checked()
    assert ran.returncode == 0, ran.stdout
    program.write_text(program.read_text().replace("outtype=", "out_type="), encoding="utf-8")
    ran = checked()
    assert ran.returncode == 1
    assert "out_type" in ran.stdout
