"""What the operating system will not give: one error that names the file, from any way in."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from terminal import BASE, TINY, start

import adapterkit
from adapterkit.errors import AdapterKitError, FormatError, NotFoundError, TruncatedFileError
from adapterkit.storage import FileSlice, Ranges

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

PATIENCE = 60  # seconds
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_with(name: str, folder: Path) -> Path:
    """Return an adapter directory without one of its files."""
    shutil.copytree(TINY, folder)
    (folder / name).unlink()
    return folder / name


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def looped(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def listening(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The address of a socket has room for some hundred bytes.
    monkeypatch.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    return path


PLACES: dict[str, Callable[[Path], Path]] = {
    "missing": lambda folder: folder / "none",
    "below-a-file": lambda _: TINY / CONFIG / "x",
    "fifo": lambda folder: fifo(folder / "x"),
    "fifo-config": lambda folder: fifo(adapter_with(CONFIG, folder / "a")).parent,
    "fifo-weights": lambda folder: fifo(adapter_with(WEIGHTS, folder / "a")).parent,
    "loop": lambda folder: looped(folder / "x"),
    "loop-weights": lambda folder: looped(adapter_with(WEIGHTS, folder / "a")).parent,
    "zero": lambda _: Path("/dev/zero"),
    "long": lambda folder: folder / ("x" * 300),
    "newline": lambda folder: folder / "a\nb",
    "nul": lambda folder: folder / "a\0b",
    "memory": lambda _: Path("/proc/self/mem"),
}
WAYS: dict[str, Callable[[Path, Path], object]] = {
    "read": lambda path, _: adapterkit.read(path),
    "read-dialect": lambda path, _: adapterkit.read(path, dialect="loralib", alpha=1.0),
    "read-base": lambda path, _: adapterkit.read(TINY, base=path),
    "inspect": lambda path, _: adapterkit.inspect(path),
    "validate": lambda path, _: adapterkit.validate(path),
    "diff": lambda path, _: adapterkit.diff(TINY, path),
    "audit": lambda path, _: adapterkit.audit(path),
    "compress": lambda path, _: adapterkit.compress(path, rank=1),
    "compress_file": lambda path, out: adapterkit.compress_file(path, out, rank=1),
    "convert": adapterkit.convert,
    "merge_files": lambda path, out: adapterkit.merge_files([TINY, path], out),
    "merge_into": lambda path, out: adapterkit.merge_into([path], BASE, out),
    "merge_into-base": lambda path, out: adapterkit.merge_into([TINY], path, out),
    "extract": lambda path, out: adapterkit.extract(path, path, out),
    "open_base": lambda path, _: adapterkit.open_base(path),
    "read_recipe": lambda path, _: adapterkit.read_recipe(path),
    "stack": lambda path, _: adapterkit.AdapterStack().load(path),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_read_is_an_error_of_ours(place: str, way: str, tmp_path: Path) -> None:
    path = PLACES[place](tmp_path)
    out = tmp_path / "out"
    with pytest.raises(AdapterKitError) as caught:
        WAYS[way](path, out)
    assert caught.value.exit_code in {3, 4}
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = listening(tmp_path / "x", monkeypatch)
    with pytest.raises(FormatError, match="x: is neither a file nor a directory"):
        adapterkit.inspect(path)


# No program can be given an argument that holds a NUL.
@pytest.mark.parametrize("place", [place for place in PLACES if place != "nul"])
def test_the_program_answers_in_one_line(place: str, tmp_path: Path) -> None:
    process = start("inspect", PLACES[place](tmp_path))
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (3, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


def gone(path: Path) -> None:
    path.unlink()


def replaced_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


CHANGES: dict[Callable[[Path], None], tuple[type[FormatError], str]] = {
    gone: (NotFoundError, "no such file"),
    replaced_by_a_directory: (FormatError, "Is a directory"),
    shortened: (TruncatedFileError, "ends before byte"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_after_its_header_is_an_error_that_names_it(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    shutil.copytree(TINY, tmp_path / "a")
    adapter = adapterkit.read(tmp_path / "a")
    change(tmp_path / "a" / WEIGHTS)
    kind, words = CHANGES[change]
    span = next(reversed(adapter.tensors.values())).read
    assert isinstance(span, FileSlice)

    def into_memory() -> None:
        with Ranges() as ranges:
            ranges.read(span, memoryview(bytearray(span.length)))

    for read in (
        span,
        into_memory,
        lambda: list(span.chunks(7)),
        lambda: adapterkit.summarize(adapter),
        lambda: adapterkit.write(adapter, tmp_path / "peft"),
        lambda: adapterkit.write(adapter, tmp_path / "x.gguf", base=BASE),
        lambda: adapterkit.compress(adapter, rank=1),
        lambda: adapterkit.merge([adapter, adapter]),
    ):
        with pytest.raises(kind, match=words) as caught:
            read()
        assert caught.value.path is not None
        assert WEIGHTS in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_fails_is_an_error_that_names_the_file() -> None:
    # The first page of a process's memory is never mapped: reading it is an I/O error.
    with pytest.raises(FormatError, match=r"self/mem: could not be read \(Input/output"):
        FileSlice(Path("/proc/self/mem"), 0, 8)()
