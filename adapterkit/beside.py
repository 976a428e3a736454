"""What lies beside an adapter in its directory and below: told by name and bytes, carried whole."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import AdapterKitError
from adapterkit.json_file import read_json_object
from adapterkit.model import BesideFile, BesideKind
from adapterkit.model.beside import NO_WEIGHTS
from adapterkit.storage import copy_file, readable
from adapterkit.weight_files import held

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from adapterkit.base import BaseModel

_TABLE = Path(__file__).with_name("beside.toml")
_QUIET = {"training", "document"}
_WEIGHTS = {BesideKind.WEIGHTS, BesideKind.HEAD}
_TEMPLATES = "additional_chat_templates/"
_MOST_ENTRIES, _DEEPEST = 10_000, 8
# Where one of these lies is another adapter's directory.
_ADAPTERS = (
    *("adapter_config.json", "adapter_model.*", "adapters.safetensors"),
    "pytorch_lora_weights.safetensors",
)
_WHOLE_MODEL = re.compile(r"For[A-Z]|LMHeadModel$")


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of beside.toml, which explains the fields."""

    names: tuple[str, ...]
    kind: str
    what: str

    def matches(self, name: str) -> bool:
        name = name.lower()
        last = name if self.kind == BesideKind.COPY else name.rpartition("/")[2]
        return any(_fits(name if "/" in pattern else last, pattern) for pattern in self.names)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file that was found, or a folder or link that was not looked into."""

    name: str
    path: Path
    kind: BesideKind | None = None
    what: str = ""


def lying_beside(
    folder: Path, own: Collection[str], base: BaseModel | None, *, deep: bool = True
) -> tuple[BesideFile, ...]:
    """Return what lies beside an adapter's own files and is no state of training or document.

    Args:
        folder: the adapter's directory, walked to the bottom; the checkpoints of a run and caches
            in it are passed over, folders with another adapter or a whole model named alone.
        own: names and patterns of the adapter's own files.
        base: the model, if known; a tokenizer that is its own is not mentioned.
        deep: whether folders in it are looked into.

    Raises:
        FormatError: if a folder or file cannot be read.
    """
    own = [pattern.lower() for pattern in own]
    found: list[BesideFile] = []
    for entry in sorted(_entries(folder, deep=deep), key=lambda each: each.name):
        if any(_fits(entry.name.lower(), pattern) for pattern in own):
            continue
        kind, what = (entry.kind, entry.what) if entry.kind else _told(entry)
        if kind is None:
            continue
        apart = None
        if kind is BesideKind.TOKENIZER:
            apart = _differs(entry, base)
            if apart is False:
                continue
        size = entry.path.stat().st_size if entry.path.is_file() else 0
        found.append(BesideFile(entry.name, kind, what, size, entry.path, bool(apart)))
    return tuple(found)


def beside_file(
    file: Path, own: Sequence[str], passed: Path, base: BaseModel | None
) -> tuple[BesideFile, ...]:
    """Return what lies beside one file of an adapter; one by a name of its own lies alone.

    Args:
        file: the weights.
        own: names of the adapter's files, that of its weights first.
        passed: the path that was given, the file or a directory.
        base: as for `lying_beside`.
    """
    if passed == file and file.name != own[0]:
        return ()
    return lying_beside(file.parent, own, base)


def carry(files: Iterable[BesideFile], folder: Path) -> None:
    """Copy what lies beside an adapter into the directory of another; whole models stay."""
    for file in files:
        if not file.carried:
            continue
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(file.path, target)


def shared_tokenizer(
    adapters: Sequence[Sequence[BesideFile]],
) -> tuple[tuple[BesideFile, ...], tuple[str, ...]]:
    """Return the tokenizer and chat template of several adapters, and names on which they differ.

    Args:
        adapters: what lies beside each. Where two differ on one file, no file is shared.
    """
    import filecmp

    found: dict[str, BesideFile] = {}
    split: set[str] = set()
    for file in (file for files in adapters for file in files):
        if file.kind is not BesideKind.TOKENIZER:
            continue
        first = found.setdefault(file.name, file)
        if first.path != file.path and not filecmp.cmp(first.path, file.path, shallow=False):
            split.add(file.name)
    return (() if split else tuple(found.values())), tuple(sorted(split))


@cache
def trained_names() -> tuple[str, ...]:
    """Return the names and patterns of trained files that the table knows, directories aside."""
    names = (name for row in _rows() if row.kind in _WEIGHTS for name in row.names)
    return tuple(name for name in names if "/" not in name)


def _told(entry: _Entry) -> tuple[BesideKind | None, str]:
    """Return what a file is to the adapter, and that in words; None for what is not mentioned."""
    rows = [row for row in _rows() if row.matches(entry.name)]
    # A name says all of a known file but this: what is not to be lost must hold weights.
    named = rows[0] if rows and rows[0].kind not in {*_WEIGHTS, "document"} else None
    if named is None and (holds := held(entry.path)).weights:
        if trained := next((row for row in rows if row.kind in _WEIGHTS), None):
            return BesideKind(trained.kind), trained.what
        if holds.factors:
            return BesideKind.ADAPTER, "another adapter"
        return BesideKind.UNKNOWN, "a weight file of unknown meaning"
    row = named or next((row for row in rows if row.kind not in _WEIGHTS), None)
    if row is None or (row.kind == BesideKind.TOKENIZER and not _of_model(entry.name)):
        return BesideKind.OTHER, NO_WEIGHTS
    return (None if row.kind in _QUIET else BesideKind(row.kind)), row.what


def _of_model(name: str) -> bool:
    """Tell whether a tokenizer's file lies where that of the model itself does."""
    return "/" not in name or name.startswith(_TEMPLATES)


@cache
def _rows() -> tuple[_Row, ...]:
    return tuple(_Row(tuple(row["names"]), row["kind"], row["what"]) for row in _table()["file"])


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def _fits(name: str, pattern: str) -> bool:
    """Match a path with a pattern, of whose stars none stands for a slash."""
    same = name.count("/") == pattern.count("/")
    return same and fnmatch.fnmatchcase(name, pattern)


def _entries(root: Path, *, deep: bool) -> Iterator[_Entry]:
    """Walk a directory, as far as it is the adapter's and within bounds."""
    folders = deque([(root, 0)])
    left = _MOST_ENTRIES
    while folders:
        folder, depth = folders.popleft()
        inner = _inside(folder)
        if depth and _is_apart(inner):
            what = "a folder with another adapter"
            yield _Entry(_name(folder, root), folder, BesideKind.ADAPTER, what)
            continue
        if depth and _holds_model(inner):
            what = "a folder with a whole model"
            yield _Entry(_name(folder, root), folder, BesideKind.COPY, what)
            continue
        for path in inner[:left]:
            if path.is_file():
                yield _Entry(_name(path, root), path)
            elif path.is_symlink() or not path.is_dir():
                what = "is a link that leads to no file, or no file itself, and not looked into"
                yield _Entry(_name(path, root), path, BesideKind.UNSEEN, what)
            elif deep and depth == _DEEPEST:
                what = f"lies {_DEEPEST} folders down and is not looked into"
                yield _Entry(_name(path, root), path, BesideKind.UNSEEN, what)
            elif deep and not _is_passed_over(path):
                folders.append((path, depth + 1))
        left -= len(inner)
        if left < 0:
            what = f"and what follows it is beyond {_MOST_ENTRIES:,} files and not looked into"
            yield _Entry(_name(inner[left], root), inner[left], BesideKind.UNSEEN, what)
            return


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _inside(folder: Path) -> list[Path]:
    with readable(folder):
        return sorted(folder.iterdir())


@cache
def _passed_over() -> tuple[str, ...]:
    return tuple(_table()["passed_over"])


def _is_passed_over(folder: Path) -> bool:
    return any(fnmatch.fnmatchcase(folder.name, pattern) for pattern in _passed_over())


def _is_apart(inner: Iterable[Path]) -> bool:
    """Tell whether the files of a folder are another adapter and what belongs to it."""
    return any(fnmatch.fnmatchcase(path.name, each) for path in inner for each in _ADAPTERS)


def _holds_model(inner: Iterable[Path]) -> bool:
    """Tell whether the files of a folder are a model that answers by itself."""
    config = next((path for path in inner if path.name == "config.json"), None)
    if config is None:
        return False
    try:
        classes = read_json_object(config).get("architectures")
    except AdapterKitError:
        return False
    named = cast("list[object]", classes) if isinstance(classes, list) else []
    return any(_WHOLE_MODEL.search(str(name)) for name in named)


def _differs(entry: _Entry, base: BaseModel | None) -> bool | None:
    """Tell whether a base has another file of that name, or none; None if that is not known."""
    if base is None or base.kind != "hf" or not base.path.is_dir():
        return None
    path, own = entry.path, base.path / entry.name
    if not own.is_file():
        return True if base.has_tensors else None  # a lone config says nothing
    import filecmp

    if filecmp.cmp(path, own, shallow=False):
        return False
    if path.suffix != ".json":
        return True
    try:
        return read_json_object(path) != read_json_object(own)
    except AdapterKitError:
        return True
