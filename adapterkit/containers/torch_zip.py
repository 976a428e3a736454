"""The zip files of `torch.save`, read without torch and without executing anything.

`archive/data.pkl` describes the object and `archive/data/N` are its storages. They are kept
uncompressed, so a tensor is a range of bytes of the file. This is the layout since torch 1.6.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from adapterkit import strangers
from adapterkit.containers.opening import MAX_NAME, file_size
from adapterkit.containers.pickle_names import Record
from adapterkit.containers.pickle_reader import RESAVE, read_pickle
from adapterkit.containers.pickle_training import TRAINING_NAMES
from adapterkit.containers.torch_tensor import TORCH_NAMES, PickledTensor, Storage, StorageType
from adapterkit.containers.zip_members import read_members
from adapterkit.errors import FormatError, UnsafePickleError
from adapterkit.storage import FileSlice, readable
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

MAX_DEPTH = 100
# Objects of the tree; a tensor is one.
MAX_NODES = 200_000
_PICKLE = "/data.pkl"
_ZIP_MAGIC = b"PK\x03\x04"
# What `torch.save` before 1.6 begins with, after the protocol: a pickled magic number.
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
_PICKLE_PROTOCOL = 0x80
_VERSION = re.compile(rb"\s*(\d+)")
_LATEST_VERSION = 10
# Records that torch reads before the object, what they are, and their most bytes.
_RECORDS = {
    ".storage_alignment": (re.compile(rb"\d{1,9}"), 9),
    ".data/serialization_id": (re.compile(rb"[ -~]*"), 1 << 10),
}
# Below this many nodes sharing does no harm, however short the pickle.
_SMALL_TREE = 10_000


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What a file of `torch.save` holds; the data of its tensors stays on disk.

    Attributes:
        path: the file.
        root: the saved object, made of dict (for OrderedDict too), list, tuple, set, frozenset,
            str, bytes, int, float, bool, None and LazyTensor. A dtype is text, `torch.bfloat16`,
            so is a device, `cuda:0`; a torch.Size is a tuple, a bytearray bytes, an object whose
            class the caller named the dict of its fields.
    """

    path: Path
    root: object

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """The tensors directly in a root that is a dict, as in a plain state dict; else none."""
        fields = cast("dict[object, object]", self.root) if type(self.root) is dict else {}
        return MappingProxyType(
            {
                name: value
                for name, value in fields.items()
                if isinstance(name, str) and isinstance(value, LazyTensor)
            }
        )


def read_torch_zip(
    path: Path,
    *,
    names: Mapping[tuple[str, str], object] = MappingProxyType({}),
    span: FileSlice | None = None,
) -> TorchFile:
    """Read what `torch.save` wrote; a name outside the allow-list is refused, never imported.

    Args:
        path: the file.
        names: what the pickle may name beside torch's own, as `read_pickle` takes it.
        span: the range of the file that is the zip, where it is not all of it.

    Raises:
        NotFoundError: if there is no file.
        UnsafePickleError: if the pickle asks for anything but tensors and plain containers, or if
            the file is a bare pickle.
        TruncatedFileError: if the file ends before its directory or before a member's data.
        FormatError: for every other defect, such as the format before torch 1.6, compressed
            members, a big-endian file, or a tensor that leaves its storage.
    """
    size = file_size(path)
    with readable(path):
        members = _members(span or FileSlice(path, 0, size))
        data = members[_PICKLE.removeprefix("/")]()
        _check_byteorder(members, path)
    raw = read_pickle(
        data,
        names={**TRAINING_NAMES, **TORCH_NAMES, **names},
        persistent=lambda identifier: _storage(identifier, members, path),
        path=path,
    )
    tree = _Tree(path)
    root, nodes = tree.convert(raw, ())
    if nodes > max(_SMALL_TREE, len(data)):
        raise FormatError(
            f"its pickle of {len(data)} bytes unfolds to {nodes} objects; {RESAVE}", path=path
        )
    _check_version(members, path)
    _check_records(members, path)
    return TorchFile(path, root)


def flatten(root: object) -> dict[str, LazyTensor]:
    """Return every tensor under `root` by the dotted path of keys and list places that leads to it.

    Args:
        root: the root of a TorchFile, or a part of it; a tensor alone gets an empty name.

    Raises:
        FormatError: if two tensors get one name, or a name is longer than `MAX_NAME`.
    """
    tensors: dict[str, LazyTensor] = {}
    for trail, tensor in trails(root).items():
        name = ".".join(trail)
        if name in tensors:
            raise FormatError("two tensors have this path", where=name)
        tensors[name] = tensor
    return tensors


def trails(root: object) -> dict[tuple[str, ...], LazyTensor]:
    """Return every tensor under `root` by the keys and list places that lead to it.

    Raises:
        FormatError: as `flatten` does.
    """
    tensors: dict[tuple[str, ...], LazyTensor] = {}
    for trail, tensor in _leaves(root, (), 0):
        if trail in tensors:
            raise FormatError("two tensors have this path", where=".".join(trail))
        tensors[trail] = tensor
    return tensors


def _leaves(
    node: object, trail: tuple[str, ...], letters: int
) -> Iterator[tuple[tuple[str, ...], LazyTensor]]:
    if isinstance(node, LazyTensor):
        yield trail, node
    for key, value in _items(node):
        if isinstance(value, LazyTensor | dict | list | tuple):
            name = str(key)
            length = letters + len(name) + bool(trail)
            if length > MAX_NAME:
                path = ".".join((*trail, name))
                raise FormatError(f"a name of more than {MAX_NAME} letters", where=path[:80])
            yield from _leaves(cast("object", value), (*trail, name), length)


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    if type(node) is dict:
        return cast("dict[Any, Any]", node).items()
    return enumerate(cast("list[Any]", node)) if type(node) in {list, tuple} else ()


def _members(span: FileSlice) -> dict[str, FileSlice]:
    """Return the members by their names after `archive/`, as ranges that do not overlap."""
    path = span.path
    _check_magic(FileSlice(path, span.offset, min(span.length, 32))(), path)
    members = read_members(span)
    for member in members:
        if not member.stored:
            raise member.error(
                "is compressed; load the file in torch with weights_only=True and save it again "
                "with torch.save, which stores"
            )
    roots = [member.name.removesuffix(_PICKLE) for member in members if _is_pickle(member.name)]
    if len(roots) != 1:
        raise FormatError(
            f"the zip has {len(roots)} members archive/data.pkl, not one: "
            "this is no file of torch.save",
            path=path,
        )
    prefix = f"{roots[0]}/"
    for member in members:
        if not member.name.startswith(prefix):
            raise member.error(
                f"lies outside of {prefix}, and torch would not read the file; remove it, or save "
                "the file again with torch.save"
            )
    return {member.name.removeprefix(prefix): member.data for member in members}


def _is_pickle(name: str) -> bool:
    return name.endswith(_PICKLE) and name.count("/") == 1


def _check_magic(begin: bytes, path: Path) -> None:
    if begin.startswith(_ZIP_MAGIC):
        return
    if _LEGACY_MAGIC in begin:
        raise FormatError(
            "is in the format of torch before 1.6; load it in torch with weights_only=True and "
            "save it again",
            path=path,
        )
    if begin[0] == _PICKLE_PROTOCOL:
        raise UnsafePickleError(
            f"is a bare pickle, not a zip of torch.save; nothing was executed; {RESAVE}", path=path
        )
    what = "is not a zip of torch.save; download or copy it again, or save it with torch anew"
    raise FormatError(strangers.content(path) or what, path=path)


def _check_byteorder(members: Mapping[str, FileSlice], path: Path) -> None:
    record = members.get("byteorder")
    if record is None:
        return
    order = FileSlice(path, record.offset, min(record.length, 8))()
    if order != b"little":
        raise FormatError(
            f"byte order {order!r}; load it in torch with weights_only=True and save it on a "
            "little-endian machine",
            path=path,
        )


def _check_records(members: Mapping[str, FileSlice], path: Path) -> None:
    """Refuse a file for whose records torch refuses it, though they change no value."""
    for name, (meant, most) in _RECORDS.items():
        record = members.get(name)
        if record is None:
            continue
        text = FileSlice(path, record.offset, min(record.length, most + 1))()
        if not meant.fullmatch(text) or len(text) > most:
            raise FormatError(
                f"holds {text[:32]!r}, which torch does not read: download it again or save it "
                "again with torch.save",
                path=path,
                where=name,
            )


def _check_version(members: Mapping[str, FileSlice], path: Path) -> None:
    """Refuse a file without a version, or of one that torch does not read."""
    record = members.get(".data/version", members.get("version"))
    text = FileSlice(path, record.offset, min(record.length, 8))() if record else b""
    version = _VERSION.match(text)
    if version is None or not 1 <= int(version[1]) <= _LATEST_VERSION:
        raise FormatError(
            f"states version {text!r}; torch reads 1 to {_LATEST_VERSION}: download it again or "
            "save it again with torch.save",
            path=path,
            where="version",
        )


def _storage(identifier: object, members: Mapping[str, FileSlice], path: Path) -> Storage:
    match identifier:
        case ("storage", StorageType() as kind, str(key), str(), int(count)):
            pass
        case _:
            raise ValueError("a persistent id that is no storage")
    where = f"data/{key}"
    data = members.get(where)
    if data is None:
        raise FormatError("this storage is not in the zip", path=path, where=where[:80])
    if data.length != count * kind.item_bytes:
        raise FormatError(
            f"holds {data.length} bytes, the pickle says {count * kind.item_bytes}",
            path=path,
            where=where,
        )
    return Storage(kind, data)


class _Tree:
    """The pickled object with its tensors resolved: finite, shallow, and nothing but plain data."""

    __slots__ = ("_busy", "_done", "_path")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._busy: set[int] = set()
        # What the pickle shares stays shared, so that the work is linear in its length.
        self._done: dict[int, tuple[object, int]] = {}

    def convert(self, node: Any, trail: tuple[object, ...]) -> tuple[Any, int]:
        """Return the plain form of `node` and the number of objects that it unfolds to."""
        if type(node) in {str, bytes, int, float, bool, type(None)}:
            return node, 1
        if type(node) in {dict, list, tuple} and not node:
            # One byte of pickle each: remembering them would cost a hundred times that.
            return type(node)(), 1
        key = id(node)
        if key in self._done:
            return self._done[key]
        if key in self._busy:
            raise self._error("a container holds itself", trail)
        if len(trail) > MAX_DEPTH:
            raise self._error(f"is nested deeper than {MAX_DEPTH} levels", trail)
        if len(self._done) >= MAX_NODES:
            raise self._error(f"is one object more than {MAX_NODES}; {RESAVE}", trail)
        self._busy.add(key)
        self._done[key] = self._convert_new(node, trail)
        self._busy.remove(key)
        return self._done[key]

    def _convert_new(self, node: Any, trail: tuple[object, ...]) -> tuple[object, int]:
        if isinstance(node, PickledTensor):
            return node.resolve(_name(trail)), 1
        if type(node) is Record:
            plain, count = self.convert(node.plain, trail)
            return plain, 1 + count
        if type(node) in {set, frozenset}:
            # Its members are scalars and tuples of scalars already.
            return node, 1 + len(node)
        if type(node) not in {dict, list, tuple}:
            raise self._error(f"is a {type(node).__name__}, neither tensor nor plain data", trail)
        values: list[Any] = []
        nodes = 1
        for key, value in _items(node):
            plain, count = self.convert(value, (*trail, key))
            values.append(plain)
            nodes += count
        if type(node) is dict:
            return dict(zip(cast("dict[Any, Any]", node), values, strict=True)), nodes
        return (values if type(node) is list else tuple(values)), nodes

    def _error(self, message: str, trail: tuple[object, ...]) -> FormatError:
        return FormatError(message, path=self._path, where=_name(trail))


def _name(trail: tuple[object, ...]) -> str:
    return ".".join(str(key)[:200] for key in trail)[:MAX_NAME]
