"""Hub ids: the cache first, and no word to the network where that was not asked for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import adapterkit
from adapterkit import hub
from adapterkit.errors import NotFoundError

pytestmark = pytest.mark.slow

PIRATE = Path(__file__).parents[2] / "fixtures" / "pirate" / "adapter"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the pirate, on its main branch and in a sub-directory of a tag."""
    folder = tmp_path / "hub" / "models--org--pirate"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "refs" / "v1").write_text("def")
    shutil.copytree(PIRATE, folder / "snapshots" / "abc")
    shutil.copytree(PIRATE, folder / "snapshots" / "def" / "inner")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("name", ["org/pirate", "hf://org/pirate", "hf://org/pirate@v1/inner"])
def test_a_cached_adapter_is_read(name: str, cache: Path) -> None:
    assert adapterkit.inspect(name).modules == 60
    assert adapterkit.diff(name, PIRATE).equal
    report = adapterkit.convert(name, cache / "copy")
    assert report.max_relative_error == 0
    assert adapterkit.audit(name).summary.modules == 60
    assert adapterkit.compress_file(name, cache / "small", rank=2).report.parameters == 115_200
    assert adapterkit.merge_files([name, PIRATE], cache / "merged").modules == 60
    assert adapterkit.validate(name).targets is not None
    stack = adapterkit.AdapterStack()
    assert stack.load(name, scale=0.5) == hub.located(name).stem


def test_what_is_not_cached_is_said_to_be_so(cache: Path) -> None:
    for name in ("org/other", "hf://org/pirate@v2", "hf://org/pirate/nowhere"):
        with pytest.raises(NotFoundError, match="not in the local hub cache; HF_HUB_OFFLINE"):
            adapterkit.read(name)
    assert cache


def test_without_the_extra_it_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(NotFoundError, match=r"pip install huggingface_hub"):
        adapterkit.read("org/other")
    assert cache


def test_a_download_asks_for_what_is_needed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, str | None, list[str]]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        (cache / "new").mkdir(exist_ok=True)
        config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64}
        (cache / "new" / "config.json").write_text(json.dumps(config))
        return str(cache / "new")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert adapterkit.open_base("org/base").name == "org/base"
    assert asked == [("org/base", None, ["config.json", "*.index.json"])]


@pytest.mark.parametrize(
    "text",
    [
        "adapter",
        "n" * 97 + "/b",
        "b/" + "n" * 5000,
        "é/b",
        "./a/b",
        "/a/b",
        "a/b/c",
        "a b/c",
        "../a/b",
        "~/a",
        "hf://a",
        "a/.b",
        "",
    ],
)
def test_paths_are_no_hub_ids(text: str) -> None:
    assert hub.parse(text) is None
