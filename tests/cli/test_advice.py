"""Whatever a message advises, the command that it names has."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import TYPE_CHECKING

import click
import pytest
from terminal import PEFT, ROOT, invoke

from adapterkit_cli.main import COMMANDS, cli

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIBRARY = ROOT / "adapterkit"
# A command, and what may belong to it: up to the end of the clause, the sentence or the bracket.
ADVICE = re.compile(
    r"\badapterkit (?P<command>[a-z]+(?: (?:run|similar|plan|project))?)"
    r"(?P<rest>(?:(?!, or )[^;`)(])*)"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# Every command that reads an adapter asks for these by name, whatever the file lacks.
READING = {"--base", "--dialect", "--alpha", "--from"}


def texts() -> Iterator[tuple[str, str]]:
    """Yield every text of the library, those of an expression joined, with its place."""
    for path in sorted(LIBRARY.rglob("*.toml")):
        for line in path.read_text("utf-8").splitlines():
            yield path.name, line
    for path in sorted(LIBRARY.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path.name, node.value
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value for p in node.values if isinstance(p, ast.Constant))
                yield path.name, "X".join(map(str, parts))


@cache
def options_of(name: str) -> set[str]:
    found: click.Command = cli
    for word in name.split():
        assert isinstance(found, click.Group)
        inner = found.get_command(click.Context(found), word)
        assert inner is not None, f"no command {name}"
        found = inner
    return {option for parameter in found.params for option in parameter.opts}


def advised() -> set[tuple[str, str, str]]:
    return {
        (place, match["command"], option)
        for place, text in texts()
        for match in ADVICE.finditer(text)
        if match["command"].split()[0] in COMMANDS
        for option in OPTION.findall(match["rest"])
    }


def test_a_command_that_is_named_has_the_options_that_are_advised() -> None:
    found = advised()
    assert {option for _, _, option in found} > {"--into", "--base", "--outtype", "--allow-lossy"}
    assert [each for each in sorted(found) if each[2] not in options_of(each[1])] == []


@pytest.mark.parametrize(
    "command",
    ["inspect", "convert", "validate", "diff", "merge", "audit", "compress", "stack", "verify"],
)
def test_what_a_file_lacks_can_be_given_to_every_command_that_reads_it(command: str) -> None:
    assert options_of(command) >= READING


@pytest.mark.parametrize("command", ["convert", "merge", "extract", "compress", "tinylora project"])
def test_what_may_be_lost_can_be_left_out_of_all_that_is_written(command: str) -> None:
    assert "--allow-lossy" in options_of(command)


def test_what_compress_advises_to_leave_out_it_leaves_out(tmp_path: Path) -> None:
    asked = ("compress", PEFT / "dora", "--rank", "1", "-o", tmp_path / "x.gguf")
    base = ("--base", PEFT / "base")
    refused = invoke(*asked, *base)
    assert refused.exit_code == 4
    assert not (tmp_path / "x.gguf").exists()
    done = invoke(*asked, *base, "--allow-lossy")
    assert done.exit_code == 0, done.stderr
    assert "dropped: " in done.stderr
