"""A checkpoint as dialects see it: tensors by name, and the settings in and beside the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from adapterkit.containers.dcp import DistributedCheckpoint, is_of_optimizer, read_dcp
from adapterkit.containers.npz import read_npz
from adapterkit.containers.safetensors import read_safetensors
from adapterkit.containers.torch_zip import flatten, read_torch_zip
from adapterkit.errors import FormatError
from adapterkit.json_file import read_json_object
from adapterkit.tables import Table
from adapterkit.tensor import LazyTensor
from adapterkit.yaml_file import read_yaml_mapping

_ZIP = b"PK"
_PROTOCOLS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_LARGEST_YAML = 64 << 10


@dataclass(frozen=True, slots=True)
class Document:
    """One file of tensors.

    Attributes:
        path: the file, or the folder of a sharded checkpoint.
        container: `torch`, `npz` or `safetensors`.
        root: the saved object; a flat dict of tensors unless it is a torch file.
        metadata: the free text of a safetensors file.
    """

    path: Path
    container: str
    root: object
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def tensors(self, select: str) -> dict[str, LazyTensor] | None:
        """Return the tensors of a sub-dictionary by dotted name, None if there is no such one.

        The root, "", means the tensors that lie directly in it.
        """
        if not select:
            return {name: v for name, v in _items(self.root) if isinstance(v, LazyTensor)}
        node = _descend(self.root, select)
        return flatten(cast("object", node)) if isinstance(node, dict) else None

    def all_tensors(self) -> dict[str, LazyTensor]:
        """Return every tensor of the file by its dotted path."""
        return flatten(self.root)

    def value(self, source: str) -> object | None:
        """Return what a dialect's source names, or None.

        Raises:
            FormatError: if a file beside this one is malformed.
        """
        kind, _, rest = source.partition(":")
        if kind == "metadata":
            return self.metadata.get(rest)
        if kind == "file":
            found = _descend(self.root, rest)
            return None if isinstance(found, LazyTensor) else found
        name, _, key = rest.partition(":")
        beside = self.path.parent / name
        return _descend(_settings(beside), key) if beside.is_file() else None

    def settings(self, source: str) -> Table:
        """Return all settings of a `beside:file` source; empty without the file."""
        beside = self.path.parent / source.partition(":")[2]
        return Table(_settings(beside) if beside.is_file() else {}, beside)


def open_document(path: Path) -> Document:
    """Open a file by its first bytes, a folder by its index; nothing but headers is read.

    Raises:
        FormatError: if it is none of the containers, or malformed.
    """
    if path.is_dir():
        return Document(path, "torch", _nested(read_dcp(path)))
    start = first_bytes(path)
    if not start.startswith(_ZIP):
        if _is_pickle(start):
            return Document(path, "torch", read_torch_zip(path).root)
        file = read_safetensors(path)
        return Document(path, "safetensors", dict(file.tensors), file.metadata)
    if _is_npz(path):
        return Document(path, "npz", dict(read_npz(path)))
    return Document(path, "torch", read_torch_zip(path).root)


def _nested(checkpoint: DistributedCheckpoint) -> dict[str, Any]:
    """Return the tensors of a sharded checkpoint as nested by its program, without optimizers."""
    root: dict[str, Any] = {}
    for trail in checkpoint.entries:
        if is_of_optimizer(trail):
            continue
        node: dict[str, Any] | None = root
        for key in trail[:-1]:
            inner: Any = None if node is None else node.setdefault(key, {})
            node = cast("dict[str, Any]", inner) if type(inner) is dict else None
        if node is None or trail[-1] in node:
            what = "lies where another tensor does"
            raise FormatError(what, path=checkpoint.folder, where=".".join(trail))
        node[trail[-1]] = checkpoint.tensor(trail)
    return root


def first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file, none for anything that cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError:
        return b""


def is_checkpoint(path: Path) -> bool:
    """Tell whether numpy or torch wrote a file, or a pickle, by its first bytes."""
    return (
        _is_pickle(first_bytes(path)) or _is_npz(path) or _first_member(path).endswith(b"/data.pkl")
    )


def _is_pickle(start: bytes) -> bool:
    # The length of a safetensors header may begin alike; the header itself begins with a brace.
    return start.startswith(_PROTOCOLS) and start[8:9] != b"{"


def _is_npz(path: Path) -> bool:
    """Tell a zip of arrays from a zip of torch by the name of its first member."""
    return _first_member(path).endswith(b".npy")


def _first_member(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            header = file.read(30)
            length = int.from_bytes(header[26:28], "little")
            return file.read(length) if header.startswith(_ZIP) else b""
    except OSError:
        return b""


def _items(node: object) -> list[tuple[str, object]]:
    if isinstance(node, dict):
        fields = cast("dict[object, object]", node)
        return [(name, value) for name, value in fields.items() if isinstance(name, str)]
    if isinstance(node, (list, tuple)):
        return [(str(place), value) for place, value in enumerate(cast("list[object]", node))]
    return []


def _descend(node: object, path: str) -> object | None:
    """Follow a dotted path through dictionaries; a key that holds dots itself is tried first."""
    if not isinstance(node, Mapping):
        return None
    fields = cast("Mapping[object, object]", node)
    if path in fields:
        return fields[path]
    head, dot, rest = path.partition(".")
    return _descend(fields[head], rest) if dot and head in fields else None


def _settings(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".json":
        return read_json_object(path)
    return read_yaml_mapping(path, largest=_LARGEST_YAML)
