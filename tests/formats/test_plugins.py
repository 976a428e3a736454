"""Formats that other packages bring: told by content or suffix, and checked as ours are."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import adapterkit
from adapterkit import plugins, registry
from adapterkit.fleets.discovery import discover, identity
from adapterkit.formats.protocol import FormatOptions
from adapterkit.formats.spec import FormatSpec
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet
from adapterkit.tensor import LazyTensor
from adapterkit.testing import check_format, small_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUP = "adapterkit.formats"
HELD = {Role.LORA_A: "down", Role.LORA_B: "up"}


def is_text(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:9] == b'{"lines":'


def read_text(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read JSON of plain numbers: one line a factor."""
    import numpy as np

    del options
    lines = json.loads(path.read_text())["lines"]
    roles = {name: role for role, name in HELD.items()}
    return AdapterTensorSet(
        tensors={
            TensorKey(module, roles[leaf]): LazyTensor.of(np.array(values, np.float32))
            for module, leaf, values, _ in lines
        },
        scales={module: scale for module, leaf, _, scale in lines if leaf == "up"},
    )


def write_text(adapter: AdapterTensorSet, path: Path, options: FormatOptions) -> None:
    del options
    lines = [
        (key.module, HELD[key.role], tensor.numpy().tolist(), adapter.scales[key.module])
        for key, tensor in adapter.tensors.items()
    ]
    path.write_text('{"lines":' + json.dumps(lines) + "}")


TEXT = FormatSpec(
    name="text",
    title="LoRA as JSON",
    reader=read_text,
    lister=lambda adapter, _: list(adapterkit.lost_beyond_pairs(adapter)),
    writer=write_text,
    probe=f"{__name__}:is_text",
    suffixes=(".lines",),
)
ENTRIES: dict[str, EntryPoint] = {
    "text": EntryPoint("text", f"{__name__}:TEXT", GROUP),
    "broken": EntryPoint("broken", "no_such_package:FORMAT", GROUP),
}


@pytest.fixture
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    entry = ENTRIES[request.param]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] * (group == GROUP))
    plugins.plugged_in.cache_clear()
    yield
    plugins.plugged_in.cache_clear()


text = pytest.mark.parametrize("installed", ["text"], indirect=True)
broken = pytest.mark.parametrize("installed", ["broken"], indirect=True)


@text
@pytest.mark.usefixtures("installed")
def test_a_plugin_passes_the_checks_that_ours_pass(tmp_path: Path) -> None:
    check_format(TEXT, tmp_path)


@text
@pytest.mark.usefixtures("installed")
def test_a_fleet_finds_the_files_of_a_plugin(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    adapterkit.write(small_adapter(), tmp_path / "inner" / "a.lines")
    (tmp_path / "strange.lines").write_text("no adapter")
    assert discover([tmp_path]) == [tmp_path / "inner" / "a.lines"]


FOLDER = FormatSpec(
    name="folder",
    title="LoRA as a folder",
    reader=lambda path, options: read_text(path / "weights" / "lines.json", options),
    probe=f"{__name__}:is_folder",
    files=("lines.toml",),
)
ENTRIES["folder"] = EntryPoint("folder", f"{__name__}:FOLDER", GROUP)


def is_folder(path: Path) -> bool:
    return (path / "lines.toml").is_file()


@pytest.mark.parametrize("installed", ["folder"], indirect=True)
@pytest.mark.usefixtures("installed")
def test_a_fleet_finds_the_folders_of_a_plugin(tmp_path: Path) -> None:
    one = tmp_path / "runs" / "one"
    (one / "weights").mkdir(parents=True)
    (one / "lines.toml").touch()
    write_text(small_adapter(), one / "weights" / "lines.json", FormatOptions())
    assert discover([tmp_path]) == [one]
    assert adapterkit.inspect(one).format == "folder"
    before = identity(one)
    (one / "weights" / "lines.json").write_text("{}")
    assert identity(one) != before


@text
@pytest.mark.usefixtures("installed")
def test_a_plugin_is_told_by_content_and_written_by_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.lines"
    adapterkit.write(small_adapter(), path)
    assert registry.detect(path).name == "text"
    done = adapterkit.convert(path, tmp_path / "peft")
    assert done.max_relative_error == 0
    known = adapterkit.inspect(path)
    assert (known.source, known.format) == (str(path), "text")
    back = adapterkit.convert(tmp_path / "peft", tmp_path / "b.lines")
    assert (back.format, back.max_relative_error) == ("text", 0)


@text
@pytest.mark.usefixtures("installed")
def test_a_plugin_is_asked_before_files_are_taken_for_hand_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.npz"
    asked: list[str] = []
    monkeypatch.setattr(f"{__name__}.is_text", lambda path: asked.append(path.name) or True)
    path.write_bytes(b"\x80\x02}.")
    assert registry.detect(path).name == "text"
    assert asked == ["a.npz"]


@text
@pytest.mark.usefixtures("installed")
def test_a_plugin_that_drops_something_is_caught(tmp_path: Path) -> None:
    careless = FormatSpec(
        name="text",
        title="",
        reader=read_text,
        lister=lambda *_: [],
        writer=lambda adapter, path, options: write_text(
            adapter.replace(tensors={k: t for k, t in adapter.tensors.items() if k.role in HELD}),
            path,
            options,
        ),
        probe=f"{__name__}:is_text",
    )
    with pytest.raises(AssertionError, match="and named no loss"):
        check_format(careless, tmp_path)


@broken
@pytest.mark.usefixtures("installed")
def test_a_plugin_that_cannot_be_imported_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.lines"
    path.write_text("x")
    with pytest.raises(adapterkit.UsageError) as caught:
        adapterkit.read(path)
    message = str(caught.value)
    assert "the plug-in 'broken' (no_such_package:FORMAT) cannot be imported" in message
    assert message.count("\n") == 0
    # What adapterkit knows itself does not ask.
    assert adapterkit.inspect(Path(__file__).parents[2] / "fixtures" / "peft" / "tiny").modules
