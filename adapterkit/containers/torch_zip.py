"""The zip files of `torch.save`, read without torch and without executing anything.

`archive/data.pkl` describes the object and `archive/data/N` are its storages. They are kept
uncompressed, so a tensor is a range of bytes of the file. This is the layout since torch 1.6.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, cast

from adapterkit.containers.opening import file_size
from adapterkit.containers.pickle_reader import RESAVE, read_pickle
from adapterkit.containers.torch_tensor import TORCH_NAMES, PickledTensor, Storage, StorageType
from adapterkit.errors import FormatError, TruncatedFileError, UnsafePickleError
from adapterkit.storage import FileSlice, readable
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

MAX_DEPTH = 100
MAX_NAME = 1000
_PICKLE = "/data.pkl"
_ZIP_MAGIC = b"PK\x03\x04"
# What `torch.save` before 1.6 begins with, after the protocol: a pickled magic number.
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
_PICKLE_PROTOCOL = 0x80
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x1
# Below this many nodes sharing does no harm, however short the pickle.
_SMALL_TREE = 10_000


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What a file of `torch.save` holds; the data of its tensors stays on disk.

    Attributes:
        path: the file.
        root: the saved object, made of dict (for OrderedDict too), list, tuple, set, frozenset,
            str, bytes, int, float, bool, None and LazyTensor. A dtype is text, `torch.bfloat16`,
            so is a device, `cuda:0`; a torch.Size is a tuple, a bytearray bytes.
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


def read_torch_zip(path: Path) -> TorchFile:
    """Read what `torch.save` wrote; a name outside the allow-list is refused, never imported.

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
        members = _members(path, size)
        data = members[_PICKLE.removeprefix("/")]()
        _check_byteorder(members, path)
    raw = read_pickle(
        data,
        names=TORCH_NAMES,
        persistent=lambda identifier: _storage(identifier, members, path),
        path=path,
    )
    tree = _Tree(path)
    root, nodes = tree.convert(raw, ())
    if nodes > max(_SMALL_TREE, len(data)):
        raise FormatError(
            f"its pickle of {len(data)} bytes unfolds to {nodes} objects; {RESAVE}", path=path
        )
    return TorchFile(path, root)


def flatten(root: object) -> dict[str, LazyTensor]:
    """Return every tensor under `root` by the dotted path of keys and list places that leads to it.

    Args:
        root: the root of a TorchFile, or a part of it; a tensor alone gets an empty name.

    Raises:
        FormatError: if two tensors get one name, or a name is longer than `MAX_NAME`.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in _leaves(root, ""):
        if name in tensors:
            raise FormatError("two tensors have this path", where=name)
        tensors[name] = tensor
    return tensors


def _leaves(node: object, name: str) -> Iterator[tuple[str, LazyTensor]]:
    if isinstance(node, LazyTensor):
        yield name, node
    for key, value in _items(node):
        if isinstance(value, LazyTensor | dict | list | tuple):
            path = f"{name}.{key}" if name else str(key)
            if len(path) > MAX_NAME:
                raise FormatError(f"a name of more than {MAX_NAME} letters", where=path[:80])
            yield from _leaves(cast("object", value), path)


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    if type(node) is dict:
        return cast("dict[Any, Any]", node).items()
    return enumerate(cast("list[Any]", node)) if type(node) in {list, tuple} else ()


def _members(path: Path, size: int) -> dict[str, FileSlice]:
    """Return the members by their names after `archive/`, as ranges that do not overlap."""
    with path.open("rb") as file:
        _check_magic(file.read(32), path)
        infos = _directory(file, path)
        ranges = [(info.header_offset, *_data_range(file, info, path)) for info in infos]
    end = 0
    for info, (header, begin, length) in zip(infos, ranges, strict=True):
        if begin + length > size:
            raise TruncatedFileError(
                f"its data ends at byte {begin + length}, the file at {size}; "
                "download or copy it again",
                path=path,
                where=info.filename,
            )
        if header < end:
            raise FormatError("overlaps the member before it", path=path, where=info.filename)
        end = begin + length
    roots = [name.filename.removesuffix(_PICKLE) for name in infos if _is_pickle(name.filename)]
    if len(roots) != 1:
        raise FormatError(
            f"the zip has {len(roots)} members archive/data.pkl, not one: "
            "this is no file of torch.save",
            path=path,
        )
    prefix = f"{roots[0]}/"
    return {
        info.filename.removeprefix(prefix): FileSlice(path, begin, length)
        for info, (_, begin, length) in zip(infos, ranges, strict=True)
        if info.filename.startswith(prefix)
    }


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
    raise FormatError("is not a zip of torch.save", path=path)


def _directory(file: IO[bytes], path: Path) -> list[zipfile.ZipInfo]:
    """Return the members in the order of their data; `zipfile` reads no more than the list."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OSError) as error:
        raise TruncatedFileError(
            f"the directory at the end of the zip is missing or broken ({error}); "
            "download or copy the file again",
            path=path,
        ) from error
    if len({info.filename for info in infos}) != len(infos):
        raise FormatError("the zip has two members of one name", path=path)
    return infos


def _data_range(file: IO[bytes], info: zipfile.ZipInfo, path: Path) -> tuple[int, int]:
    """Return where a member's data begins, which only its local header says, and its length."""
    if info.flag_bits & _ENCRYPTED:
        raise FormatError("is encrypted", path=path, where=info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise FormatError(
            "is compressed; load the file in torch with weights_only=True and save it again with "
            "torch.save, which stores",
            path=path,
            where=info.filename,
        )
    if info.header_offset < 0:
        raise FormatError("lies before the file", path=path, where=info.filename)
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
        raise FormatError("has no local header", path=path, where=info.filename)
    *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return file.tell() + name_length + extra_length, info.file_size


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
        self._busy.add(key)
        self._done[key] = self._convert_new(node, trail)
        self._busy.remove(key)
        return self._done[key]

    def _convert_new(self, node: Any, trail: tuple[object, ...]) -> tuple[object, int]:
        if isinstance(node, PickledTensor):
            return node.resolve(_name(trail)), 1
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
