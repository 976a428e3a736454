"""Every option of every command that takes a path or words, given what no file or word should be.

The table of options is made from the program itself: an option that is added is asked too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import torch  # noqa: F401  (an alarm in the middle of its import would break all that follow)
from moments import a_moment
from number_edges import Edge, write_base
from pretend_servers import pretending, vllm
from terminal import TINY, invoke

import adapterkit
from adapterkit_cli.main import cli

pytestmark = pytest.mark.slow

Made = Callable[[Path], str]


def commands(
    group: click.Group = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def asked(parameter: click.Parameter) -> bool:
    return isinstance(parameter.type, click.Path) or parameter.type.name == "text"


# Asked over the network, with a patience of its own.
AWAY = {("fleet run", "dask"), ("fleet similar", "dask")}
OPTIONS = [
    (" ".join(path), str(parameter.name))
    for path, command in commands()
    for parameter in command.params
    if asked(parameter) and (" ".join(path), parameter.name) not in AWAY
]
COMMANDS = {" ".join(path): command for path, command in commands()}
# What a command is given besides; `{}` is a folder with an adapter and a model, `{url}` a server.
USUAL: dict[str, dict[str, str]] = {
    "inspect": {"sources": "{}/a"},
    "convert": {"sources": "{}/a", "destination": "{}/out", "base": "{}/base"},
    "validate": {"sources": "{}/a", "base": "{}/base"},
    "diff": {"first": "{}/a", "second": "{}/a"},
    "stack": {"adapters": "{}/a", "engine": "vllm", "base": "{}/base"},
    "audit": {"sources": "{}/a"},
    "doctor": {"url": "{url}"},
    "fleet run": {"action": "inspect", "sources": "{}/a", "folder": "{}/ran", "jobs": "1"},
    "fleet similar": {"sources": "{}/a", "folder": "{}/prints", "jobs": "1"},
    "verify": {"file": "{}/proven"},
    "compress": {"source": "{}/a", "destination": "{}/out", "rank": "1"},
    "merge": {"sources": "{}/a", "destination": "{}/out"},
    "extract": {"base": "{}/base", "tuned": "{}/tuned", "destination": "{}/out"},
    "tinylora plan": {"base": "{}/base", "budget": "100"},
    "tinylora project": {
        "source": "{}/a",
        "destination": "{}/out",
        "base": "{}/base",
        "projection_dim": "4",
    },
}
# What replaces other parameters of the line.
INSTEAD = {("merge", "recipe"): ("sources", "destination")}
# Any text is a prompt.
WORDS = {"explain", "targets", "engine", "prompts"}
WRITTEN = {"destination", "html", "bank_file"}
# Folder that a fleet goes on in, made where it is not, and those of the usual lines.
KEPT, MADE = "folder", ("out", "ran", "prints")


def linked(folder: Path, target: str) -> str:
    (folder / "link").symlink_to(target)
    return str(folder / "link")


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


def filled(name: str, data: bytes) -> Made:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(data)
        return str(folder / name)

    return make


PLACES: dict[str, Made] = {
    "name of 300 letters": lambda folder: str(folder / ("x" * 300)),
    "path of 9000 letters": lambda folder: str(folder) + "/x" * 4500,
    "pipe": pipe,
    "zeros without end": lambda _: "/dev/zero",
    "memory": lambda _: "/proc/self/mem",
    "link to nothing": lambda folder: linked(folder, "nothing"),
    "link to itself": lambda folder: linked(folder, "link"),
    "link to zeros": lambda folder: linked(folder, "/dev/zero"),
    "below a file": lambda _: f"{TINY}/adapter_config.json/x",
    "not UTF-8": lambda folder: f"{folder}/\udcff/a",
    "line break": lambda folder: f"{folder}/a\nb",
    "control characters": lambda folder: f"{folder}/\x1b[2J\x07\u202e",
    "nothing": lambda _: "",
    "a hub's id that is none": lambda _: "a/../../b",
    "a hub's id of 300 letters": lambda _: f"{'a' * 300}/{'b' * 300}",
    "hub reference, not UTF-8": lambda _: "hf://a\udcff/b@\udcff",
}


def naming_itself(folder: Path) -> str:
    path = folder / "x.txt"
    path.write_text(f"{path}\n")
    return str(path)


FILES: dict[str, Made] = {
    "list that names itself": naming_itself,
    "list, not UTF-8": filled("x.txt", b"\xff/a\n"),
    "list of nothing": filled("x.txt", b"\0\n"),
    "empty file": filled("x.toml", b""),
    "zeros": filled("x", b"\0" * 4096),
    "not UTF-8": filled("x.yaml", b"\xff\xfe\xff"),
    "deep YAML": filled("x.yaml", b"[" * 20_000),
    "YAML aliases": filled("x.yaml", b"a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
    "deep TOML": filled("x.toml", b"x=" + b"[" * 20_000),
    "long keys of TOML": filled("x.toml", b".".join([b"a"] * 20_000) + b"=1"),
    "deep JSON": filled("x.json", b'{"a":' * 20_000),
    "bomb of zeros": filled("x.pt", b"PK\x03\x04" + b"\0" * 100),
}


def line(command: str, name: str, value: str, folder: Path) -> list[str]:
    url = (folder / "url").read_text()
    usual = {key: each.format(folder, url=url) for key, each in USUAL[command].items()}
    for other in INSTEAD.get((command, name), ()):
        usual.pop(other, None)
    words = [*command.split()]
    for parameter in COMMANDS[command].params:
        given = value if parameter.name == name else usual.get(str(parameter.name))
        if given is None:
            continue
        if isinstance(parameter, click.Argument):
            # What begins with a dash would be an option.
            words.append(given)
        else:
            words.append(f"{max(parameter.opts, key=len)}={given}")
    return words


@cache
def model(root: Path) -> Path:
    folder = root / "model"
    folder.mkdir()
    Edge().write(folder / "a", 1)
    write_base(folder / "base", 32)
    write_base(folder / "tuned", 32, add=Edge().deltas(1))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = model(tmp_path_factory.mktemp("options"))
    adapterkit.convert(folder / "a", folder / "proven")
    with pretending(vllm) as url:
        (folder / "url").write_text(url)
        yield folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where nothing lies: what names no folder may mean the current one."""
    monkeypatch.chdir(tmp_path_factory.mktemp("current"))


def inside(folder: Path) -> dict[Path, Any]:
    """Return what lies in a folder, and when it was changed."""
    return {path: path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_every_command_has_a_usual_line() -> None:
    assert {command for command, _ in OPTIONS} == USUAL.keys()


@pytest.mark.parametrize("command", USUAL)
def test_the_usual_line_is_a_sound_one(command: str, files: Path, tmp_path: Path) -> None:
    """What is refused below is refused for what is put into it."""
    written = dict.fromkeys(USUAL[command].keys() & WRITTEN, tmp_path / "out")
    name, out = next(iter(written.items()), ("", tmp_path))
    assert invoke(*line(command, name, str(out), files)).exit_code == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("command", "name"), OPTIONS)
def test_an_odd_path_or_word_is_an_error_of_ours(
    command: str, name: str, place: str, files: Path, tmp_path: Path
) -> None:
    checked(command, name, PLACES[place](tmp_path), files, tmp_path)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("command", "name"),
    [(c, n) for c, n in OPTIONS if n not in WRITTEN and n not in WORDS],
)
def test_an_odd_file_is_an_error_of_ours(
    command: str, name: str, file: str, files: Path, tmp_path: Path
) -> None:
    checked(command, name, FILES[file](tmp_path), files, tmp_path)


def checked(command: str, name: str, value: str, files: Path, folder: Path) -> None:
    before, own = inside(folder), inside(files)
    words = line(command, name, value, files)
    with a_moment():
        result = invoke(*words)
    path = isinstance(_parameter(command, name).type, click.Path)
    # A fleet's exit code is that of its adapters, each of which has a row.
    answered = any((files / made).exists() for made in MADE)
    if name in WRITTEN:
        # One that can be created is; all others are refused, and a link is something that exists.
        assert result.exit_code in ({0} if not before and result.exit_code == 0 else {1, 2})
    elif path and name != KEPT and not answered:
        assert result.exit_code in {1, 2, 3, 4, 5}
    if result.exit_code and not answered:
        last = result.stderr.splitlines()[-1]
        assert last.startswith("Error: ") or result.exit_code in {1, 4, 5}
        assert all(each.isprintable() for each in result.stderr.splitlines())
        if result.exit_code != 2:
            assert len(result.stderr) < 2 * len(value) + 2000
        assert inside(folder) == before
    assert inside(files) == own or result.exit_code == 0 or answered
    for made in MADE:
        if (files / made).exists():
            _removed(files / made)


def _removed(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _parameter(command: str, name: str) -> click.Parameter:
    return next(each for each in COMMANDS[command].params if each.name == name)


@pytest.mark.parametrize("name", ["nothing", "link"])
@pytest.mark.parametrize(("command", "option"), [(c, n) for c, n in OPTIONS if n in WRITTEN])
def test_a_link_at_the_destination_is_something_that_exists(
    command: str, option: str, name: str, files: Path, tmp_path: Path
) -> None:
    result = invoke(*line(command, option, linked(tmp_path, name), files))
    assert result.exit_code == 1
    assert "is a link to" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
