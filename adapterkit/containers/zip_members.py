"""The members of a zip as ranges of its file, with every claim of the directory checked.

`zipfile` reads the directory and no more. Each member has a header of its own beside its data, and
a zip in which the two differ is another one to each program that reads it: it is refused.
"""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

from adapterkit.containers.opening import MAX_BYTES, MAX_NAME
from adapterkit.errors import FormatError, TruncatedFileError
from adapterkit.storage import FileSlice

if TYPE_CHECKING:
    from pathlib import Path

MAX_MEMBERS = 100_000
# Eighty bytes for each of them; zipfile takes ten times as much memory.
MAX_DIRECTORY = 8 << 20
_COMMENT = 1 << 17
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_MAGIC = b"PK\x03\x04"
# The end of the directory: parts, entries, its size and place, and how long a comment follows.
_END = struct.Struct("<4s4H2LH")
_END_MAGIC = b"PK\x05\x06"
# An entry of the directory, and in it the lengths of its name, extra fields and comment.
_ENTRY, _LENGTHS_AT, _LENGTHS = 46, 28, struct.Struct("<3H")
# Where the wide form of the end is, which stands between the directory and it; and that form.
_LOCATOR = struct.Struct("<4sLQL")
_LOCATOR_MAGIC = b"PK\x06\x07"
_WIDE_END = struct.Struct("<4sQ2H2L4Q")
_WIDE_MAGIC = b"PK\x06\x06"
_ENCRYPTED = 0x1
_SIZES_FOLLOW = 0x8
_UTF8 = 0x800
_DIRECTORY = 0x10
_IN_EXTRA = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class ZipMember:
    """One member of a zip.

    Attributes:
        name: as the zip spells it.
        data: its bytes in the file, compressed or not.
        size: bytes after expanding.
        crc: checksum of the expanded bytes.
        method: number of the compression.
    """

    name: str
    data: FileSlice
    size: int
    crc: int
    method: int

    @property
    def stored(self) -> bool:
        """Whether its bytes are in the file as they are."""
        return self.method == zipfile.ZIP_STORED and self.data.length == self.size

    def error(self, message: str) -> FormatError:
        """Return an error that names the file and the member."""
        return FormatError(message, path=self.data.path, where=self.name)


def read_members(span: FileSlice) -> list[ZipMember]:
    """Return every member in the order of the directory; no two share a byte.

    Args:
        span: a range of a file that begins with a member, most often all of it.

    Raises:
        TruncatedFileError: if the directory, or the data of a member, is not whole.
        FormatError: if there are too many members, two of one name, one that is encrypted, that
            another overlaps, or whose own header contradicts the directory.
    """
    with span.path.open("rb") as file:
        bounded = _Bounded(file, span)
        infos = _directory(bounded, span.path)
        _check_end(bounded, len(infos), span.path, span.length)
        heads = [_head(file, info, span) for info in infos]
    found = [_member(info, head, span) for info, head in zip(infos, heads, strict=True)]
    end = span.offset
    for place in sorted(range(len(infos)), key=lambda place: infos[place].header_offset):
        if span.offset + infos[place].header_offset < end:
            raise found[place].error("overlaps the member before it")
        end = found[place].data.offset + found[place].data.length
    for info, head, member in zip(infos, heads, found, strict=True):
        if not head.agrees(info):
            message = "its own header contradicts the directory; download or copy the file again"
            raise member.error(message)
    return found


class _Bounded:
    """A range of a file that gives at most `MAX_DIRECTORY` bytes at once, as `zipfile` asks."""

    def __init__(self, file: IO[bytes], span: FileSlice) -> None:
        self._file = file
        self._begin, self._end = span.offset, span.offset + span.length
        file.seek(span.offset)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: self._begin, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._end}
        if start[whence] + offset < self._begin:
            raise OSError("a place before the zip")
        return self._file.seek(start[whence] + offset) - self._begin

    def tell(self) -> int:
        return self._file.tell() - self._begin

    def read(self, length: int = -1) -> bytes:
        if length > MAX_DIRECTORY:
            raise ValueError(f"it has {length} bytes, the most is {MAX_DIRECTORY}")
        # Without a length zipfile reads up to the end, from where a comment of 64 KiB may begin.
        wanted = length if length >= 0 else _COMMENT
        return self._file.read(max(0, min(wanted, self._end - self._file.tell())))


def _directory(file: _Bounded, path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(cast("Any", file)) as archive:
            infos = archive.infolist()
    except (
        zipfile.BadZipFile,
        ArithmeticError,
        ValueError,
        NotImplementedError,
        struct.error,
        OSError,
    ) as error:
        raise TruncatedFileError(
            f"the directory at the end of the zip is missing or broken ({error}); "
            "download or copy the file again",
            path=path,
        ) from error
    if len(infos) > MAX_MEMBERS:
        raise FormatError(f"has {len(infos)} members, the most is {MAX_MEMBERS}", path=path)
    names: set[str] = set()
    for info in infos:
        if len(info.orig_filename) > MAX_NAME:
            name = f"{info.orig_filename[:80]}..."
            raise FormatError(f"a name of more than {MAX_NAME} letters", path=path, where=name)
        if info.filename in names:
            raise FormatError("the zip has two members of one name", path=path, where=info.filename)
        names.add(info.filename)
    return infos


def _check_end(file: _Bounded, count: int, path: Path, size: int) -> None:
    """Refuse an end that does not say where the directory is: `zipfile` guesses, others believe it.

    Raises:
        FormatError: if it names other parts, numbers or places than there are.
    """
    start = max(0, size - _END.size - _COMMENT // 2)
    file.seek(start)
    tail = file.read(size - start)
    place = tail.rfind(_END_MAGIC)
    if place < 0 or place + _END.size > len(tail):
        raise TruncatedFileError("the end of the zip's directory is missing", path=path)
    _, *numbers, comment = _END.unpack_from(tail, place)
    whole = place + _END.size + comment == len(tail)
    ends = start + place
    wide = _wide_end(file, ends)
    for small, large in zip(numbers, wide, strict=True) if wide else ():
        whole = whole and small in {large, 0xFFFF, _IN_EXTRA}
    part, first, here, entries, length, begin = wide or numbers
    ends -= _LOCATOR.size + _WIDE_END.size if wide else 0
    whole = whole and not part and not first and here == entries == count
    if not whole or begin + length != ends or _entries_end(file, begin, count) != ends:
        message = "the end of the zip contradicts its directory; download or copy the file again"
        raise FormatError(message, path=path)


def _entries_end(file: _Bounded, place: int, count: int) -> int:
    """Return where the last of the directory's entries ends, by their own lengths."""
    for _ in range(count):
        file.seek(place + _LENGTHS_AT)
        lengths = file.read(_LENGTHS.size)
        place += _ENTRY + (sum(_LENGTHS.unpack(lengths)) if len(lengths) == _LENGTHS.size else 0)
    return place


def _wide_end(file: _Bounded, ends: int) -> tuple[int, ...] | None:
    """Return the six numbers of the wide form, None if there is none before the end at `ends`."""
    place = ends - _LOCATOR.size - _WIDE_END.size
    if place < 0:
        return None
    file.seek(place)
    data = file.read(_WIDE_END.size + _LOCATOR.size)
    magic, part, begin, parts = _LOCATOR.unpack_from(data, _WIDE_END.size)
    if magic != _LOCATOR_MAGIC:
        return None
    found, *_, here_part, first, here, entries, length, where = _WIDE_END.unpack_from(data)
    sound = found == _WIDE_MAGIC and begin == place and not part and parts <= 1
    return (here_part, first, here, entries, length, where) if sound else (-1,) * 6


@dataclass(frozen=True, slots=True)
class _Head:
    """The header that stands before a member's data."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    end: int

    def agrees(self, info: zipfile.ZipInfo) -> bool:
        """Tell whether it says what the directory says."""
        letters = "utf-8" if self.flags & _UTF8 else "cp437"
        name = info.orig_filename.encode(letters, "replace")
        # zipfile cuts names at a NUL, other programs do not.
        same = self.name == name and info.orig_filename == info.filename
        same = same and (self.flags, self.method) == (info.flag_bits, info.compress_type)
        if self.flags & _SIZES_FOLLOW:
            return same
        sizes = self.packed in {info.compress_size, _IN_EXTRA}
        sizes = sizes and self.size in {info.file_size, _IN_EXTRA}
        return same and sizes and self.crc == info.CRC


def _head(file: IO[bytes], info: zipfile.ZipInfo, span: FileSlice) -> _Head:
    path, where = span.path, info.filename
    if info.flag_bits & _ENCRYPTED:
        raise FormatError("is encrypted", path=path, where=where)
    if info.volume:
        raise FormatError("lies in another file of a zip in parts", path=path, where=where)
    if info.external_attr & _DIRECTORY and not where.endswith("/"):
        raise FormatError("is marked as a directory", path=path, where=where)
    if info.header_offset < 0:
        raise FormatError("lies before the file", path=path, where=where)
    if max(info.header_offset, info.compress_size, info.file_size) > MAX_BYTES:
        raise FormatError("has a place or size that no file has", path=path, where=where)
    begin = span.offset + info.header_offset
    file.seek(begin)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_MAGIC):
        raise FormatError("has no local header", path=path, where=where)
    _, _, flags, method, _, _, crc, packed, size, name, extra = _LOCAL_HEADER.unpack(header)
    end = begin + _LOCAL_HEADER.size + name + extra
    return _Head(file.read(name), flags, method, crc, packed, size, end)


def _member(info: zipfile.ZipInfo, head: _Head, span: FileSlice) -> ZipMember:
    end = span.offset + span.length
    if head.end + info.compress_size > end:
        raise TruncatedFileError(
            f"its data ends at byte {head.end + info.compress_size}, the file at {end}; "
            "download or copy it again",
            path=span.path,
            where=info.filename,
        )
    data = FileSlice(span.path, head.end, info.compress_size)
    return ZipMember(info.filename, data, info.file_size, info.CRC, info.compress_type)
