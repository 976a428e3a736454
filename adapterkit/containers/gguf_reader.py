"""Reading GGUF headers: strict, bounded by the file's size, and without touching tensor data.

The rules are those of llama.cpp's own parser: whatever it refuses is refused here, because an
adapter that only some readers accept is a trap. On top come the specification's own limits.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from adapterkit import strangers
from adapterkit.containers.gguf_values import (
    ALIGNMENT_KEY,
    CODES,
    DEFAULT_ALIGNMENT,
    GGML_TYPES,
    LENGTH,
    MAGIC,
    MAX_DIMS,
    MAX_ENTRIES,
    MAX_KEY_BYTES,
    MAX_LENGTH,
    MAX_NAME_BYTES,
    MAX_TENSORS,
    SIZES,
    VERSION,
    GGUFArray,
    GGUFValue,
    Scalar,
    Typed,
    ValueType,
)
from adapterkit.containers.opening import check_shape, file_size
from adapterkit.errors import FormatError, TruncatedFileError
from adapterkit.storage import FileSlice, readable
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from io import FileIO

    from adapterkit.dtype import DType

_WINDOW = 1 << 18
# Key of one byte, type, value of one byte; name of one byte, dimensions, type, offset.
_SMALLEST_ENTRY = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 4 + 8


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The header of a GGUF file, with its tensors as byte ranges.

    Attributes:
        path: the file.
        version: 2 or 3.
        metadata: values by key in file order, numbers as Python numbers, arrays undecoded.
        kinds: type of each value; ARRAY for arrays, whose own `kind` is that of the elements.
        tensors: tensors by name in file order, shapes in C order (GGUF's reversed).
        alignment: bytes that every tensor's start is a multiple of.
        header_end: where the header ends; padding follows.
        data_offset: where the first tensor starts.
        trailing: bytes after the last tensor and its padding; engines ignore them.
    """

    path: Path
    version: int
    metadata: Mapping[str, Scalar | GGUFArray]
    kinds: Mapping[str, ValueType]
    tensors: Mapping[str, LazyTensor]
    alignment: int
    header_end: int
    data_offset: int
    trailing: int

    def typed(self) -> dict[str, GGUFValue]:
        """Return the metadata with its types, as `write_gguf` takes it; arrays stay on disk."""
        return {
            key: value if isinstance(value, GGUFArray) else Typed(self.kinds[key], value)
            for key, value in self.metadata.items()
        }


def read_gguf(path: Path) -> GGUFFile:
    """Parse and check the whole header; leave arrays and tensors on disk.

    Args:
        path: a little-endian GGUF file of version 2 or 3.

    Raises:
        NotFoundError: if there is nothing at `path`.
        TruncatedFileError: if a count or length points past the end of the file.
        FormatError: if it is no regular file, or the header breaks another rule of the format.
    """
    file_size(path)
    with readable(path), path.open("rb", buffering=0) as file:
        return _parse(_Cursor(file, path))


def _parse(cursor: _Cursor) -> GGUFFile:
    version = _version(cursor)
    tensor_count = cursor.number("<Q", "the number of tensors")
    entry_count = cursor.number("<Q", "the number of metadata entries")
    _check_counts(cursor, entry_count, tensor_count)
    metadata: dict[str, Scalar | GGUFArray] = {}
    kinds: dict[str, ValueType] = {}
    for _ in range(entry_count):
        key = _key(cursor, metadata)
        kinds[key], metadata[key] = _value(cursor)
        cursor.where = None
    alignment = _alignment(cursor.path, metadata, kinds)
    table: dict[str, tuple[DType, tuple[int, ...], int]] = {}
    for _ in range(tensor_count):
        name = _name(cursor, table)
        table[name] = _tensor(cursor)
        cursor.where = None
    header_end = cursor.at
    data_offset = header_end + -header_end % alignment
    tensors, end = _placed(cursor, table, data_offset, alignment)
    return GGUFFile(
        path=cursor.path,
        version=version,
        metadata=MappingProxyType(metadata),
        kinds=MappingProxyType(kinds),
        tensors=MappingProxyType(tensors),
        alignment=alignment,
        header_end=header_end,
        data_offset=data_offset,
        trailing=max(0, cursor.size - end),
    )


def _check_counts(cursor: _Cursor, entries: int, tensors: int) -> None:
    cursor.require(entries * _SMALLEST_ENTRY, f"{entries} metadata entries")
    cursor.require(tensors * _SMALLEST_TENSOR, f"{tensors} tensors")
    if entries > MAX_ENTRIES:
        raise cursor.broken(f"has {entries} metadata entries; the limit is {MAX_ENTRIES}")
    if tensors > MAX_TENSORS:
        raise cursor.broken(f"has {tensors} tensors; the limit is {MAX_TENSORS}")


def _version(cursor: _Cursor) -> int:
    if (magic := cursor.take(4, "the magic")) != MAGIC:
        what = f"starts with {magic!r}, not {MAGIC!r}; this is no GGUF file"
        raise cursor.broken(strangers.content(cursor.path) or what)
    version = cursor.number("<I", "the version")
    if version and not version & 0xFFFF:
        raise cursor.broken(
            "is big-endian, which engines refuse; convert it to little-endian first"
        )
    if not 1 < version <= VERSION:
        raise cursor.broken(
            f"is GGUF version {version}; only 2 and {VERSION} are read; convert the model again"
        )
    return version


def _key(cursor: _Cursor, known: Mapping[str, object]) -> str:
    key = cursor.text("a metadata key", MAX_KEY_BYTES)
    if not key:
        raise cursor.broken(f"metadata key {len(known)} is empty")
    cursor.where = key
    if key in known:
        raise cursor.broken("the metadata key appears twice")
    return key


def _value(cursor: _Cursor) -> tuple[ValueType, Scalar | GGUFArray]:
    kind = _kind(cursor)
    if kind is ValueType.ARRAY:
        return kind, _array(cursor)
    if kind is ValueType.STRING:
        return kind, cursor.text("a string", MAX_LENGTH)
    data = cursor.take(SIZES[kind], f"a {kind.name} value")
    (number,) = struct.unpack(f"<{CODES[kind]}", data)
    if kind is not ValueType.BOOL:
        return kind, number
    if number > 1:
        raise cursor.broken(f"the boolean is {number}, neither 0 nor 1")
    return kind, bool(number)


def _kind(cursor: _Cursor) -> ValueType:
    number = cursor.number("<I", "a value type")
    if number > max(ValueType):
        raise cursor.broken(f"value type {number} is unknown; the known ones are 0 to 12")
    return ValueType(number)


def _array(cursor: _Cursor) -> GGUFArray:
    kind = _kind(cursor)
    if kind is ValueType.ARRAY:
        raise cursor.broken("the array holds arrays, which engines refuse")
    length = cursor.number("<Q", "an array length")
    cursor.require(length * SIZES.get(kind, LENGTH.size), f"an array of {length} {kind.name}")
    if length > MAX_LENGTH:
        raise cursor.broken(f"the array has {length} elements; engines refuse more than 2^30")
    begin = cursor.at
    if kind is ValueType.STRING:
        cursor.skip_strings(length)
    else:
        cursor.at += length * SIZES[kind]
    return GGUFArray(kind, length, FileSlice(cursor.path, begin, cursor.at - begin))


def _alignment(
    path: Path, metadata: Mapping[str, Scalar | GGUFArray], kinds: Mapping[str, ValueType]
) -> int:
    if ALIGNMENT_KEY not in kinds:
        return DEFAULT_ALIGNMENT
    kind, value = kinds[ALIGNMENT_KEY], metadata[ALIGNMENT_KEY]
    if kind is not ValueType.UINT32 or not isinstance(value, int):
        raise FormatError(f"must be UINT32 but is {kind.name}", path=path, where=ALIGNMENT_KEY)
    if value < 1 or value & (value - 1):
        raise FormatError(f"{value} is not a power of two", path=path, where=ALIGNMENT_KEY)
    return value


def _name(cursor: _Cursor, known: Mapping[str, object]) -> str:
    name = cursor.text("a tensor name", MAX_NAME_BYTES)
    if not name or "\0" in name:
        raise cursor.broken(
            f"tensor {len(known)} is named {name!r}; it needs 1 to 63 bytes without NUL"
        )
    cursor.where = name
    if name in known:
        raise cursor.broken("the tensor name appears twice")
    return name


def _tensor(cursor: _Cursor) -> tuple[DType, tuple[int, ...], int]:
    count = cursor.number("<I", "the number of dimensions")
    if count > MAX_DIMS:
        raise cursor.broken(f"has {count} dimensions; ggml has at most {MAX_DIMS}")
    shape = tuple(cursor.number("<Q", "a dimension") for _ in range(count))[::-1]
    number = cursor.number("<I", "a tensor type")
    dtype = GGML_TYPES.get(number)
    if dtype is None:
        raise cursor.broken(f"ggml type {number} is unknown or was removed; quantise it again")
    row = shape[-1] if shape else 1
    if row % dtype.block:
        raise cursor.broken(
            f"rows of {row} elements do not hold whole {dtype} blocks of {dtype.block}"
        )
    check_shape(dtype, shape, path=cursor.path, where=cursor.where or "")
    return dtype, shape, cursor.number("<Q", "a data offset")


def _placed(
    cursor: _Cursor,
    table: Mapping[str, tuple[DType, tuple[int, ...], int]],
    data_offset: int,
    alignment: int,
) -> tuple[dict[str, LazyTensor], int]:
    """Return the tensors on their byte ranges, and where the last one's padding ends."""
    tensors: dict[str, LazyTensor] = {}
    expected = 0
    for name, (dtype, shape, offset) in table.items():
        cursor.where = name
        if offset != expected:
            raise cursor.broken(
                f"data starts at offset {offset}, not {expected}; tensors must follow each other"
            )
        length = dtype.nbytes(shape)
        cursor.at = data_offset + offset
        cursor.require(length, f"{dtype} data of shape {list(shape)}")
        tensors[name] = LazyTensor(dtype, shape, FileSlice(cursor.path, cursor.at, length))
        expected += length + -length % alignment
    return tensors, data_offset + expected


class _Cursor:
    """A place in the header, and a window of the file around it.

    Attributes:
        path: the file.
        size: bytes of the file.
        at: the next byte to look at; may be moved freely.
        where: the key or tensor that errors are about.
    """

    def __init__(self, file: FileIO, path: Path) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self.where: str | None = None
        self._file = file
        self._window = b""
        self._start = 0

    def broken(self, message: str) -> FormatError:
        """Return an error about the current key or tensor."""
        return FormatError(message, path=self.path, where=self.where)

    def require(self, length: int, what: str) -> None:
        """Fail unless `length` more bytes are in the file: before anything is allocated."""
        if length > self.size - self.at:
            raise TruncatedFileError(
                f"{what} would end at byte {self.at + length} or later, but the file has "
                f"{self.size} bytes; it is cut off or corrupt, get it again",
                path=self.path,
                where=self.where,
            )

    def take(self, length: int, what: str) -> bytes:
        """Return the next `length` bytes."""
        self.require(length, what)
        begin = self.at - self._start
        if begin < 0 or begin + length > len(self._window):
            self._load(max(length, _WINDOW))
            begin = 0
        self.at += length
        data = self._window[begin : begin + length]
        if len(data) != length:
            raise TruncatedFileError("the file shrank while it was read", path=self.path)
        return data

    def number(self, code: str, what: str) -> int:
        """Return the next integer."""
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str, limit: int) -> str:
        """Return the next string of at most `limit` bytes."""
        length = self.number("<Q", f"the length of {what}")
        self.require(length, what)
        if length > limit:
            raise self.broken(f"{what} at byte {self.at} has {length} bytes; the limit is {limit}")
        data = self.take(length, what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.broken(f"{what} is not utf-8 ({data[:32]!r})") from error

    def skip_strings(self, count: int) -> None:
        """Move behind `count` strings, looking only at their lengths.

        A vocabulary has hundreds of thousands: this loop is the time that opening a model takes.
        """
        unpack = LENGTH.unpack_from
        done = 0
        while done < count:
            self.require(LENGTH.size, f"string {done} of an array of {count}")
            self._load(_WINDOW)
            window, at, first = self._window, 0, done
            limit = len(window) - LENGTH.size
            if limit < 0:
                raise TruncatedFileError("the file shrank while it was read", path=self.path)
            for done in range(first + 1, count + 1):  # noqa: B007  (read after the loop)
                at += unpack(window, at)[0] + 8
                if at > limit:
                    break
            self.at += at
        self.require(0, f"an array of {count} strings")

    def _load(self, length: int) -> None:
        """Fill the window from the current place on."""
        self._file.seek(self.at)
        self._window = b""
        self._start = self.at
        length = min(length, self.size - self.at)
        # An unbuffered read may return less than asked for without being at the end.
        while len(self._window) < length:
            more = self._file.read(length - len(self._window))
            if not more:
                return
            self._window += more
