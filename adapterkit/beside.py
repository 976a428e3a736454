"""What lies beside an adapter in its directory: looked at by name, carried byte for byte."""

from __future__ import annotations

import fnmatch
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import AdapterKitError
from adapterkit.json_file import read_json_object
from adapterkit.model import BesideFile, BesideKind
from adapterkit.storage import copy_file

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from adapterkit.base import BaseModel

_TABLE = Path(__file__).with_name("beside.toml")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".npz"}
_TRAINING = "training"


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of beside.toml, which explains the fields."""

    names: tuple[str, ...]
    kind: str
    what: str

    def matches(self, name: str) -> bool:
        depth = name.count("/")
        return any(
            pattern.count("/") == depth and fnmatch.fnmatchcase(name, pattern)
            for pattern in self.names
        )


def lying_beside(
    folder: Path, own: Collection[str], base: BaseModel | None
) -> tuple[BesideFile, ...]:
    """Return what belongs to an adapter beside its own files, by name.

    Args:
        folder: the adapter's directory; of those in it only sentence-transformers' modules are
            looked into.
        own: names and patterns of the adapter's own files.
        base: the model, if known; a tokenizer that is its own is not mentioned.
    """
    found: list[BesideFile] = []
    for name in sorted(_names(folder)):
        path = folder / name
        row = next((row for row in _rows() if row.matches(name)), None)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in own):
            continue
        if row is None and path.suffix not in _WEIGHTS:
            continue
        kind = row.kind if row else BesideKind.UNKNOWN
        what = row.what if row else "a weight file of unknown meaning"
        if kind == _TRAINING:
            continue
        apart = None
        if kind == BesideKind.TOKENIZER:
            apart = _differs(path, base)
            if apart is False:
                continue
        size = path.stat().st_size
        found.append(BesideFile(name, BesideKind(kind), what, size, path, bool(apart)))
    return tuple(found)


def carry(files: Iterable[BesideFile], folder: Path) -> None:
    """Copy what lies beside an adapter into the directory of another; whole models stay."""
    for file in files:
        if file.kind is BesideKind.COPY:
            continue
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(file.path, target)


@cache
def trained_names() -> tuple[str, ...]:
    """Return the names and patterns of trained files that the table knows, directories aside."""
    kinds = {BesideKind.WEIGHTS, BesideKind.HEAD}
    names = (name for row in _rows() if row.kind in kinds for name in row.names)
    return tuple(name for name in names if "/" not in name)


@cache
def _rows() -> tuple[_Row, ...]:
    rows = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["file"]
    return tuple(_Row(tuple(row["names"]), row["kind"], row["what"]) for row in rows)


def _names(folder: Path) -> Iterator[str]:
    inner = {pattern.rpartition("/")[0] for row in _rows() for pattern in row.names} - {""}
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path.name
        elif path.is_dir() and any(fnmatch.fnmatchcase(path.name, each) for each in inner):
            yield from (f"{path.name}/{each.name}" for each in path.iterdir() if each.is_file())


def _differs(path: Path, base: BaseModel | None) -> bool | None:
    """Tell whether a base has another file of that name, or none; None if that is not known."""
    if base is None or base.kind != "hf" or not base.path.is_dir():
        return None
    own = base.path / path.name
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
