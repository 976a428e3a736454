"""The direction of imports, read from the source; lazy ones and those for types count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# A command each, side by side: none imports another.
WORKSHOPS = {
    "auditing",
    "comparison",
    "compression",
    "conversion",
    "doctor",
    "extraction",
    "files",
    "merging",
    "projection",
    "serving",
    "summary",
    "testing",
    "torch",
    "validation",
    "verification",
}
# From the bottom up. A module imports from lower layers and from its own folder.
LAYERS = (
    {"keys", "advice"},
    {"notes"},
    {"errors", "dtype", "blas", "late"},
    {
        "storage",
        "quantisation",
        "disk",
        "work",
        "text",
        "spreadsheet",
        "tables",
        "strangers",
        "training",
        "served",
        "destination",
        "plugins",
    },
    {"tensor", "output", "weight_files"},
    {"page"},
    {"model", "json_file"},
    {"containers", "factors", "yaml_file", "patterns", "hub", "lowrank"},
    {"architectures"},
    {"base"},
    {"passes", "beside", "stamps"},
    {"lora_config", "tinylora", "tuners", "unrecognised"},
    {"formats"},
    {"registry"},
    {"fingerprints", "given_alpha"},
    {"proof", "loading", "certificates"},
    {"several"},
    {"alterations", "attempts", "compressed", "saving", "checks", "diagnosis", "state_dict"},
    {"engines"},
    WORKSHOPS,
    {"fleets"},  # does to many what the workshops do to one
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What stands in `formats` beside the formats.
COMMON = {"protocol", "spec"}
# What may be known of the terminal by the package that never uses it.
TERMINAL = {"click", "rich", "argparse", "adapterkit_cli", "warnings", "getpass"}
LIBRARY = sorted((ROOT / "adapterkit").rglob("*.py"))
WAYS_IN = {ROOT / "adapterkit" / "__init__.py", ROOT / "adapterkit" / "__main__.py"}
PROGRAM = sorted((ROOT / "cli" / "adapterkit_cli").rglob("*.py"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_module(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


def imports(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, at any depth of it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(path)}: relative import"
            source = str(node.module)
            folder = ROOT / source.replace(".", "/")
            # `from adapterkit import patterns` imports a module, most do not.
            names = [alias.name for alias in node.names]
            found |= {f"{source}.{n}" if is_module(folder, n) else source for n in names}
    return found


def place(module: str) -> str:
    """Return the first component under adapterkit: a module or a folder."""
    return module.split(".")[1]


@pytest.mark.parametrize("path", [p for p in LIBRARY if p not in WAYS_IN], ids=shown)
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(ROOT / "adapterkit").with_suffix("").parts[0]
    assert own in LEVEL, f"{own} has no layer yet: give it one here"
    used = {place(name) for name in imports(path) if name.startswith("adapterkit.")} - {own}
    assert "adapterkit" not in imports(path), "imports the public names from below"
    assert {name for name in used if LEVEL[name] >= LEVEL[own]} == set()


def test_no_two_files_need_each_other() -> None:
    left = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): imports(path)
        for path in LIBRARY
        if path not in WAYS_IN and path.name != "__init__.py"
    }
    # What imports nothing that is left goes; those that stay import each other in a circle.
    while free := {name for name, used in left.items() if not used & left.keys()}:
        left = {name: used for name, used in left.items() if name not in free}
    assert sorted(left) == []


@pytest.mark.parametrize("path", sorted((ROOT / "adapterkit" / "formats").rglob("*.py")), ids=shown)
def test_a_format_imports_no_other_format(path: Path) -> None:
    folder = "adapterkit.formats."
    top = path.relative_to(ROOT / "adapterkit" / "formats").with_suffix("").parts[0]
    used = {name.removeprefix(folder) for name in imports(path) if name.startswith(folder)}
    assert {name for name in used if name.partition(".")[0] not in {top, *COMMON}} == set()


@pytest.mark.parametrize("name", sorted(COMMON))
def test_what_formats_share_knows_none(name: str) -> None:
    used = imports(ROOT / "adapterkit" / "formats" / f"{name}.py")
    assert not {name for name in used if name.startswith("adapterkit.formats.")} - {
        "adapterkit.formats.protocol"
    }


@pytest.mark.parametrize("path", LIBRARY, ids=shown)
def test_only_the_command_line_prints_reads_arguments_or_exits(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = {ast.unparse(node) for node in nodes if isinstance(node, (ast.Name, ast.Attribute))}
    forbidden = {"print", "input", "exit", "quit", "SystemExit", "os._exit"}
    forbidden |= {f"sys.{name}" for name in ("exit", "argv", "stdout", "stderr", "stdin")}
    assert names & forbidden == set()
    used = {name.split(".")[0] for name in imports(path)}
    if path.name != "__main__.py":
        assert used & TERMINAL == set()


@pytest.mark.parametrize("path", PROGRAM, ids=shown)
def test_the_command_line_uses_what_everybody_may_use(path: Path) -> None:
    public = {"adapterkit", "adapterkit.errors", "adapterkit.registry", "adapterkit.architectures"}
    public |= {
        f"adapterkit.{name}"
        for name in ("tinylora", "projection", "destination", "auditing.tables", "auditing.places")
    } | {"adapterkit.auditing.json_document", "adapterkit.auditing.outliers"}
    public |= {
        f"adapterkit.{name}"
        for name in (
            "attempts",
            "page",
            "spreadsheet",
            "text",
            "saving",
            "formats.handwritten.dialects",
            "formats.handwritten.dialects.loading",
        )
    } | {
        f"adapterkit.{name}"
        for name in ("architectures.mixtures", "checks.findings", "serving.launch")
    }
    used = {name for name in imports(path) if name.split(".")[0] == "adapterkit"}
    assert used <= public


def test_the_checks_see_what_they_look_for(tmp_path: Path) -> None:
    path = tmp_path / "probe.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import adapterkit.convert\n"
        "def late():\n    from adapterkit.formats import gguf\n    import adapterkit.base.opening\n"
    )
    modules = {"convert", "formats.gguf", "base.opening"}
    assert imports(path) == {"typing", *(f"adapterkit.{name}" for name in modules)}
