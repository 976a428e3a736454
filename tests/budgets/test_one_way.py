"""One way in, one way out: what only loading and saving may call, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adapterkit"
# Functions that find, open, read or check; and what they are called on where the name is common.
WAYS = ("format.read", "format.write", "spec.read", "spec.write")
STEPS = {"detect", "open_base", "find_base", "check_structure"}
# The ways themselves, the rooms below them, and the place where the public names are listed.
OWN = {"loading.py", "saving.py", "registry.py", "testing.py", "__init__.py"}
ROOMS = {"formats", "base"}
FILES = [
    path
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "cli").rglob("*.py")])
    if str(path.relative_to(ROOT)) not in {f"adapterkit/{name}" for name in OWN}
    and not (path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).parts[0] in ROOMS)
]


def steps(source: str) -> set[str]:
    """Return the steps of a way in that a module takes itself."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        if imported.get(called) in STEPS or ("." in called and name in STEPS):
            found.add(name)
        if called.endswith(WAYS):
            found.add(called)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_command_takes_a_step_of_the_way_itself(path: Path) -> None:
    assert steps(path.read_text(encoding="utf-8")) == set()


def test_the_check_sees_what_it_looks_for() -> None:
    lines = (
        "from adapterkit.base import open_base as opened, find_base",
        "from adapterkit import registry",
        "from adapterkit.model.defects import check_structure",
        "opened(1); find_base(2); registry.detect(3); spec.read(4); a.format.write(5)",
        "check_structure(6); detect(7)",
    )
    seen = {
        "opened",
        "find_base",
        "detect",
        "check_structure",
        "spec.read",
        "a.format.write",
    }
    assert steps("\n".join(lines)) == seen
    assert {path.name for path in FILES} >= {"convert.py", "measure.py", "tinylora.py"}
