"""Find the adapters that a folder, a list or the hub cache holds, and tell one content by a key."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from adapterkit.errors import AdapterKitError, FormatError, NotFoundError
from adapterkit.hub import cache_folder, located
from adapterkit.loading import recognise
from adapterkit.registry import added_suffixes
from adapterkit.storage import alike, read_lines, readable

# What a user types for all that the hub cache holds.
HUB_CACHE = "hub-cache"
_CONFIG = "adapter_config.json"
_LIST = ".txt"
# Bytes of a list: a million long paths.
_LONGEST = 1 << 28
_GGUF = ".gguf"
_FILES = {_GGUF, ".safetensors", ".npz", ".pt", ".bin"}
# Words of an adapter's keys, which stand before the vocabulary of a GGUF model.
_OF_ADAPTERS, _HEAD = b"adapter.", 1 << 16
# What is looked at of a file: every one of so many bytes, at the start of each step.
_SAMPLE, _STEP = 4096, 1 << 20


def discover(sources: Iterable[Path | str]) -> list[Path]:
    """Return the full path of every adapter that the sources mean, each once, in their order.

    A source is an adapter, a hub id, a folder that is searched to its end, a `.txt` file with one
    source in each line, or `hub-cache`. Whole models and what belongs to an adapter's directory are
    passed over.

    Raises:
        NotFoundError: if there is nothing at a source.
        FormatError: if a list is no text, or names itself.
    """
    found: dict[str, Path] = {}
    for source in sources:
        for path in _of(source, ()):
            whole = os.path.abspath(path)  # noqa: PTH100  (links stay links)
            found.setdefault(os.path.realpath(path), Path(whole))
    return sorted(found.values())


def _of(source: Path | str, lists: tuple[Path, ...]) -> Iterator[Path]:
    """Yield what a source means; `lists` are those that it stands in, the outermost first."""
    if str(source) == HUB_CACHE:
        for snapshot in sorted(cache_folder().glob("models--*/snapshots/*")):
            yield from _within(snapshot)
        return
    if not str(source):
        raise NotFoundError("a source is empty; the folder that you are in is `.`")
    path = located(source)
    with readable(path):
        if path.suffix == _LIST and path.is_file():
            yield from _listed(path, lists)
        elif path.is_dir():
            yield from _within(path)
        elif path.exists():
            yield path
        else:
            raise NotFoundError(f"no such file or directory{alike(path)}", path=path)


def _listed(path: Path, lists: tuple[Path, ...]) -> Iterator[Path]:
    real = path.resolve()
    if real in lists:
        raise FormatError("names itself, directly or by another list", path=path)
    for line in read_lines(path, _LONGEST):
        yield from _of(line.strip(), (*lists, real))


def _within(root: Path) -> Iterator[Path]:
    suffixes = _FILES | added_suffixes()
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        here = Path(folder)
        if _CONFIG in names:
            yield here
        elif "config.json" not in names:
            files = [here / name for name in sorted(names) if Path(name).suffix in suffixes]
            yield from (file for file in files if _is_adapter(file))
        else:
            yield from (here / name for name in sorted(names) if _is_gguf_adapter(here / name))


def _is_gguf_adapter(file: Path) -> bool:
    if file.suffix != _GGUF or not file.is_file():
        return False
    with file.open("rb") as opened:
        return _OF_ADAPTERS in opened.read(_HEAD)


def _is_adapter(file: Path) -> bool:
    if file.suffix == _GGUF:
        return _is_gguf_adapter(file)
    try:
        recognise(file)
    except AdapterKitError:
        return False
    return True


def identity(path: Path) -> str:
    """Return a key that changes when what lies at a path does; nearly nothing is read for it.

    It is taken over the names, sizes and times of the files, and 4 KiB of each MiB of them.

    Raises:
        FormatError: if a file cannot be read.
    """
    whole = hashlib.blake2b(digest_size=16)
    with readable(path):
        files = [p for p in sorted(path.iterdir()) if p.is_file()] if path.is_dir() else [path]
        for file in files:
            known = file.stat()
            whole.update(f"{file.name}\0{known.st_size}\0{known.st_mtime_ns}\0".encode())
            with file.open("rb") as opened:
                for start in range(0, known.st_size, _STEP):
                    opened.seek(start)
                    whole.update(opened.read(_SAMPLE))
    return whole.hexdigest()
