"""Find the adapters that a folder, a list or the hub cache holds, and tell one content by a key."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from adapterkit.errors import AdapterKitError, FormatError, NotFoundError
from adapterkit.formats.spec import FormatSpec
from adapterkit.hub import cache_folder, located
from adapterkit.loading import recognise
from adapterkit.registry import added_suffixes, claims, folder_format, spec
from adapterkit.several import each_of
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


@dataclass(frozen=True, slots=True)
class Reading:
    """How adapters are read that do not tell it themselves.

    Attributes:
        dialect: key grammar of hand-written files.
        as_format: name of the format that all are in.
    """

    dialect: str | None = None
    as_format: str | None = None

    def folder(self, path: Path, names: Sequence[str]) -> FormatSpec | None:
        """Return the format of which a folder is one adapter, with the names of its files."""
        if self.as_format is None:
            return folder_format(path, names)
        known = spec(self.as_format)
        return known if known.marked(names) or (known.own_files and claims(known, path)) else None

    def file(self, path: Path) -> bool:
        """Tell whether a file is an adapter by itself."""
        if self.as_format is not None:
            known = spec(self.as_format)
            return not known.files and path.suffix in (known.suffixes or _FILES)
        if path.suffix == _GGUF:
            return _is_gguf_adapter(path)
        try:
            return not recognise(path, dialect=self.dialect).format.own_files
        except AdapterKitError:
            return False


_DETECTED = Reading()


def discover(sources: Iterable[Path | str], reading: Reading = _DETECTED) -> list[Path]:
    """Return the full path of every adapter that the sources mean, each once, in their order.

    A source is an adapter, a hub id, a folder that is searched to its end, a `.txt` file with one
    source in each line, or `hub-cache`. Whole models and what belongs to an adapter's directory are
    passed over.

    Raises:
        NotFoundError: if there is nothing at a source.
        FormatError: if a list is no text, or names itself.
        UsageError: if the format to read them as is unknown.
    """
    if reading.as_format is not None:
        spec(reading.as_format)
    found: dict[str, Path] = {}
    for source in each_of(sources):
        for path in _of(source, reading, ()):
            whole = os.path.abspath(path)  # noqa: PTH100  (links stay links)
            found.setdefault(os.path.realpath(path), Path(whole))
    return sorted(found.values())


def _of(source: Path | str, reading: Reading, lists: tuple[Path, ...]) -> Iterator[Path]:
    """Yield what a source means; `lists` are those that it stands in, the outermost first."""
    if str(source) == HUB_CACHE:
        for snapshot in sorted(cache_folder().glob("models--*/snapshots/*")):
            yield from _within(snapshot, reading)
        return
    if not str(source):
        raise NotFoundError("a source is empty; the folder that you are in is `.`")
    path = located(source)
    with readable(path):
        if path.suffix == _LIST and path.is_file():
            yield from _listed(path, reading, lists)
        elif path.is_dir():
            yield from _within(path, reading)
        elif path.exists():
            yield path
        else:
            raise NotFoundError(f"no such file or directory{alike(path)}", path=path)


def _listed(path: Path, reading: Reading, lists: tuple[Path, ...]) -> Iterator[Path]:
    real = path.resolve()
    if real in lists:
        raise FormatError("names itself, directly or by another list", path=path)
    for line in read_lines(path, _LONGEST):
        yield from _of(line.strip(), reading, (*lists, real))


def _within(root: Path, reading: Reading) -> Iterator[Path]:
    """Yield the adapters that lie in a folder, itself among them."""
    suffixes = _FILES | added_suffixes()
    runs: set[Path] = set()  # folders that are adapters, and all below them
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        here = Path(folder)
        known = None if _CONFIG in names else reading.folder(here, names)
        if here.parent in runs or _CONFIG in names or known is not None:
            runs.add(here)
        if _CONFIG in names:
            yield here
            continue
        if known is not None and not (known.own_files and here.parent in runs):
            yield here  # the data of a run's checkpoint belong to the run
        if "config.json" in names:
            own = [here / name for name in sorted(names) if Path(name).suffix == _GGUF]
        else:
            own = [here / name for name in sorted(names) if Path(name).suffix in suffixes]
        parts = known.files if known is not None else ()
        yield from (
            file
            for file in own
            if not any(fnmatch(file.name, part) for part in parts) and reading.file(file)
        )


def _is_gguf_adapter(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return _OF_ADAPTERS in opened.read(_HEAD)


def identity(path: Path) -> str:
    """Return a key that changes when what lies at a path does; nearly nothing is read for it.

    It is taken over the names, sizes and times of the files, and 4 KiB of each MiB of them.

    Raises:
        FormatError: if a file cannot be read.
    """
    whole = hashlib.blake2b(digest_size=16)
    with readable(path):
        for file in _files(path) if path.is_dir() else [path]:
            known = file.stat()
            if not stat.S_ISREG(known.st_mode):  # a pipe is waited for without end
                raise FormatError("is not a regular file", path=file)
            name = file.relative_to(path) if file != path else file.name
            whole.update(f"{name}\0{known.st_size}\0{known.st_mtime_ns}\0".encode())
            with file.open("rb") as opened:
                for start in range(0, known.st_size, _STEP):
                    opened.seek(start)
                    whole.update(opened.read(_SAMPLE))
    return whole.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of an adapter's folder, but for those of other adapters below it."""
    for place, inner, names in os.walk(folder):
        here = Path(place)
        own = (name for name in inner if not name.startswith("."))
        inner[:] = sorted(name for name in own if not (here / name / _CONFIG).is_file())
        yield from (here / name for name in sorted(names) if (here / name).is_file())
