"""Checkpoints of `torch.distributed.checkpoint`: a pickled index, and the tensors of each rank.

`.metadata` says which pieces a tensor has and where; a piece is a whole zip of `torch.save` in a
range of `__RANK_NUMBER.distcp` (torch/distributed/checkpoint/metadata.py, filesystem.py, 2.13). The
index is read as data: nothing that it names is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from adapterkit.containers.folders import DATA_SUFFIX, INDEX
from adapterkit.containers.opening import MAX_NAME, check_shape, file_size
from adapterkit.containers.pickle_names import Constructor, Record, RecordClass
from adapterkit.containers.pickle_reader import MAX_PICKLE, Bounds, read_pickle
from adapterkit.containers.tiles import Tile, gap, joined
from adapterkit.containers.torch_tensor import DTYPES, TORCH_NAMES
from adapterkit.containers.torch_zip import read_torch_zip
from adapterkit.errors import FormatError, NotFoundError, TruncatedFileError, UnsupportedError
from adapterkit.storage import FileSlice, read_document
from adapterkit.tensor import LazyTensor

_WHOLE = (
    "make one file of it in torch, then pass that: "
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER state.pt"
)
# A piece of a tensor takes 170 steps and ten containers: sixty thousand of them.
_BOUNDS = Bounds(10_000_000, 1_000_000, _WHOLE)
_MOST_PIECES = 4096
_CLASSES = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
)

_OPTIMIZER = re.compile(r"^optim\w*(?:\.|$)")

Trail = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a piece lies."""

    file: str
    offset: int
    length: int
    packed: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as the index describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class DistributedCheckpoint:
    """What a checkpoint holds; tensors are opened one by one, their data stays on disk.

    Attributes:
        folder: the directory.
        entries: the tensors by the keys of the saved dictionaries that lead to each, outermost
            first; a single key where the program did not save them.
        places: where the pieces lie, by the tensor's full name and the piece's offset.
    """

    folder: Path
    entries: Mapping[Trail, _Entry]
    places: Mapping[tuple[str, tuple[int, ...]], _Place]

    def tensor(self, trail: Trail) -> LazyTensor:
        """Return a tensor, joined from the pieces of all ranks.

        Raises:
            NotFoundError: if a file is missing.
            TruncatedFileError: if a file ends before a piece.
            UnsupportedError: if the pieces are compressed.
            FormatError: if pieces are missing, overlap, or are not what the index says.
        """
        entry = self.entries[trail]
        index = self.folder / INDEX
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            what = f"holds {entry.dtype[:40]}, which cannot be read; save it as a real dtype"
            raise FormatError(what, path=index, where=entry.name)
        check_shape(dtype, entry.shape, path=index, where=entry.name)
        pieces = [piece for piece in dict.fromkeys(entry.pieces) if 0 not in piece[1]]
        if len(pieces) > _MOST_PIECES:
            raise self._wrong(entry, f"has {len(pieces)} pieces, the most is {_MOST_PIECES}")
        if problem := gap(entry.shape, pieces):
            raise self._wrong(entry, problem)
        tiles = [Tile(offset, self._piece(entry, offset, size)) for offset, size in pieces]
        if any(tile.piece.dtype is not dtype for tile in tiles):
            raise self._wrong(entry, f"is {dtype} in the index, and not in the files")
        return joined(dtype, entry.shape, tiles) if tiles else LazyTensor(dtype, entry.shape, bytes)

    def _piece(self, entry: _Entry, offset: tuple[int, ...], size: tuple[int, ...]) -> LazyTensor:
        place = self.places.get((entry.name, offset))
        if place is None:
            raise self._wrong(entry, f"the index does not say where its piece at {list(offset)} is")
        path = self.folder / place.file
        if place.packed:
            raise UnsupportedError(f"is compressed; {_WHOLE}", path=path, where=entry.name)
        try:
            length = file_size(path)
        except NotFoundError as error:
            missing = "is missing, and holds pieces of the adapter; copy the files of all ranks"
            raise NotFoundError(missing, path=path, where=entry.name) from error
        if place.offset + place.length > length:
            short = f"ends at byte {length}, its piece at {place.offset + place.length}"
            raise TruncatedFileError(f"{short}; copy it again", path=path, where=entry.name)
        span = FileSlice(path, place.offset, place.length)
        found = read_torch_zip(path, span=span).root
        if not isinstance(found, LazyTensor) or found.shape != size:
            held = list(found.shape) if isinstance(found, LazyTensor) else type(found).__name__
            message = f"holds {held} at byte {place.offset}, the index says {list(size)}"
            raise FormatError(message, path=path, where=entry.name)
        return found

    def _wrong(self, entry: _Entry, message: str) -> FormatError:
        return FormatError(message, path=self.folder / INDEX, where=entry.name)


def is_of_optimizer(trail: Trail) -> bool:
    """Tell whether keys lead to the state of an optimizer, which may be nested or one long name."""
    return any(_OPTIMIZER.match(key) for key in (trail[0], trail[-1]))


def read_dcp(folder: Path) -> DistributedCheckpoint:
    """Read the index of a checkpoint; the data is looked at when a tensor is asked for.

    Raises:
        NotFoundError: if there is no index.
        UnsafePickleError: if it asks for anything but an index's own classes.
        FormatError: if it is malformed or too large.
    """
    path = folder / INDEX
    data = read_document(path, MAX_PICKLE)
    root = read_pickle(data, names=_NAMES, persistent=_no_storage, path=path, bounds=_BOUNDS)
    index = _fields(root, "Metadata", path)
    trails = index.get("planner_data")
    entries: dict[Trail, _Entry] = {}
    for name, value in _mapping(index.get("state_dict_metadata"), path).items():
        if isinstance(value, Record) and value.kind == "TensorStorageMetadata":
            entry = _entry(name, value, path)
            entries[_trail(trails, entry.name)] = entry
    return DistributedCheckpoint(folder, entries, _places(index.get("storage_data"), path))


def _trail(trails: object, name: str) -> Trail:
    """Return the keys that the program nested; those of lists are numbers."""
    found = cast("Mapping[object, object]", trails).get(name) if type(trails) is dict else None
    keys = cast("tuple[object, ...]", found) if type(found) is tuple else ()
    return tuple(map(str, keys)) or (name,)


def _entry(name: object, value: object, path: Path) -> _Entry:
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise FormatError(f"a name that is no text of {MAX_NAME} letters", path=path)
    fields = _fields(value, "TensorStorageMetadata", path)
    chunks, properties = fields.get("chunks"), fields.get("properties")
    state = properties.state if isinstance(properties, Record) else None
    dtype = cast("tuple[object, ...]", state)[0] if type(state) is tuple and state else None
    if type(chunks) is not list or not isinstance(dtype, str):
        raise FormatError("is described in an unknown way", path=path, where=name)
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for chunk in cast("list[object]", chunks):
        piece = _fields(chunk, "ChunkStorageMetadata", path)
        boxes.append((_sizes(piece.get("offsets"), path), _sizes(piece.get("sizes"), path)))
    return _Entry(name, dtype, _sizes(fields.get("size"), path), tuple(boxes))


def _places(value: object, path: Path) -> dict[tuple[str, tuple[int, ...]], _Place]:
    places: dict[tuple[str, tuple[int, ...]], _Place] = {}
    for key, place in _mapping(value, path).items():
        index = _fields(key, "MetadataIndex", path)
        name, offset = index.get("fqn"), index.get("offset")
        if not isinstance(name, str):
            raise FormatError("a place is that of no tensor", path=path)
        if offset is None:
            continue  # a pickled object
        where = (name, _sizes(offset, path))
        if where in places:
            raise FormatError("a piece has two places", path=path, where=name)
        places[where] = _place(name, _fields(place, "_StorageInfo", path), path)
    return places


def _place(name: str, fields: Mapping[str, object], path: Path) -> _Place:
    match fields:
        case {"relative_path": str(file), "offset": int(begin), "length": int(length)} if (
            begin >= 0 and length >= 0
        ):
            if "/" in file or "\\" in file or not file.endswith(DATA_SUFFIX):
                message = f"lies in {file[:80]!r}, which is no {DATA_SUFFIX} file beside the index"
                raise FormatError(message, path=path, where=name)
            return _Place(file, begin, length, bool(fields.get("transform_descriptors")))
        case _:
            raise FormatError("its place is described in an unknown way", path=path, where=name)


def _fields(value: object, kind: str, path: Path) -> Mapping[str, object]:
    if isinstance(value, Record) and value.kind == kind and type(value.state) is dict:
        return cast("Mapping[str, object]", value.state)
    raise FormatError(f"has something else where an index of torch has {kind}", path=path)


def _mapping(value: object, path: Path) -> Mapping[object, object]:
    if type(value) is not dict:
        raise FormatError("has no tables of tensors and places", path=path)
    return cast("Mapping[object, object]", value)


def _sizes(value: object, path: Path) -> tuple[int, ...]:
    items = cast("tuple[Any, ...]", value if type(value) is tuple else (None,))
    if not all(type(item) is int and item >= 0 for item in items):
        raise FormatError("has sizes that are no whole numbers", path=path)
    return items


def _no_storage(_: object) -> NoReturn:
    raise ValueError("a persistent id in an index")


def _joined_path(arguments: tuple[object, ...]) -> str:
    return "/".join(part for part in arguments if isinstance(part, str))


def _number(arguments: tuple[object, ...]) -> int:
    match arguments:
        case (int(value),):
            return value
        case _:
            raise ValueError("a member of an enumeration without a number")


def _text(arguments: tuple[object, ...]) -> str:
    match arguments:
        case (str(value),):
            return value
        case _:
            raise ValueError("a layout without a name")


_MODULE = "torch.distributed.checkpoint"
_NAMES: Mapping[tuple[str, str], object] = {
    **TORCH_NAMES,
    **{(f"{_MODULE}.metadata", name): RecordClass(name) for name in _CLASSES},
    (f"{_MODULE}.filesystem", "_StorageInfo"): RecordClass("_StorageInfo"),
    (f"{_MODULE}.metadata", "_MEM_FORMAT_ENCODING"): Constructor("_MEM_FORMAT_ENCODING", _number),
    ("torch.serialization", "_get_layout"): Constructor("_get_layout", _text),
    **{
        (module, name): Constructor(name, _joined_path)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}
