"""The zip of arrays that `numpy.savez` writes, read without pickle and within bounds.

Every member is one `.npy` file: a header that states type, order and shape, then the values. What
the header states must be what the zip states, before anything is expanded.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adapterkit.containers.opening import check_shape, file_size
from adapterkit.containers.zip_members import ZipMember, read_members
from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.storage import FileSlice, readable
from adapterkit.tensor import LazyTensor, encode

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

# Trained factors are noise to deflate, about 1:1, and 2:1 where float32 was saved as float64.
# Only half of an adapter can be zeros. So a sound file stays far below FREE + RATIO * size, while a
# zip bomb, at up to 1032:1, does not.
FREE_BYTES = 64 << 20
MAX_RATIO = 20
# numpy's own limit for a header that it is willing to parse.
MAX_HEADER = 10_000
_SUFFIX = ".npy"
_MAGIC = b"\x93NUMPY"
_LOCAL_MAGIC = b"PK\x03\x04"
_RAW_DEFLATE = -15
_RESAVE = "save it again with numpy.savez as float32 or float64"
# The longest prefix before a header's text: magic, version, and a length of four bytes.
_PREFIX = 12
_LENGTHS = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}
# The header is a Python literal; its three fields are plain enough to be read without Python.
_NAMES = ["descr", "fortran_order", "shape"]
# Possessive quantifiers: a hostile header must not be tried in more than one way. Spaces are
# those of Python's own grammar.
_GAP = r"[ \t\r\n\f]*+"
_VALUE = r"(?:'[^'\\]*+'|\[[^\]]*+\]|True|False|\([\d, \t\r\n\fL]*+\))"
_ENTRY = rf"{_GAP}'\w++'{_GAP}:{_GAP}{_VALUE}{_GAP}"
_FIELD = re.compile(rf"'(\w++)'{_GAP}:{_GAP}({_VALUE})")
_HEADER = re.compile(rf"[ \t]*+\{{(?:{_ENTRY}(?:,|(?=\}})))*+{_GAP}\}}{_GAP}")
# A tuple, so that one size alone has a comma after it.
_SIZE = rf"{_GAP}(?:0|[1-9]\d{{0,18}})L?+{_GAP}"
_SHAPE = re.compile(rf"\((?:{_GAP}|{_SIZE},(?:{_SIZE},)*+(?:{_SIZE})?+{_GAP})\)")
_TYPES = {
    "f8": DType.F64,
    "f4": DType.F32,
    "f2": DType.F16,
    "i8": DType.I64,
    "i4": DType.I32,
    "i2": DType.I16,
    "i1": DType.I8,
    "u8": DType.U64,
    "u4": DType.U32,
    "u2": DType.U16,
    "u1": DType.U8,
    "b1": DType.BOOL,
}


@dataclass(frozen=True, slots=True)
class _Member:
    """One member of the zip, and how its bytes are expanded."""

    zipped: ZipMember

    @property
    def name(self) -> str:
        """Its name, as the zip spells it."""
        return self.zipped.name

    @property
    def size(self) -> int:
        """Bytes after expanding."""
        return self.zipped.size

    def start(self, length: int) -> bytes:
        """Return the first bytes, at most `length`, expanding no more than that."""
        data = self.zipped.data
        begin = partial(FileSlice, data.path, data.offset)
        if self.zipped.stored:
            return begin(min(length, data.length))()
        # 1032:1 is the most that deflate can do, and its own blocks need some room.
        packed = begin(min(length + 512, data.length))()
        try:
            return zlib.decompressobj(_RAW_DEFLATE).decompress(packed, length)
        except zlib.error as error:
            raise self.zipped.error(f"its compressed data is broken ({error})") from error

    def whole(self) -> bytes:
        """Return all bytes, exactly `size` of them, their checksum verified."""
        data = self.zipped.data()
        if not self.zipped.stored:
            machine = zlib.decompressobj(_RAW_DEFLATE)
            try:
                data = machine.decompress(data, self.size + 1)
            except zlib.error as error:
                raise self.zipped.error(f"its compressed data is broken ({error})") from error
        if len(data) != self.size:
            raise self.zipped.error(
                f"expands to other than the {self.size} bytes that the zip states"
            )
        if zlib.crc32(data) != self.zipped.crc:
            raise self.zipped.error("its checksum is wrong; download or copy the file again")
        return data


def read_npz(path: Path) -> Mapping[str, LazyTensor]:
    """Return every array by its name without `.npy`; nothing is expanded but the headers.

    Stored and deflated members are read, in C and in Fortran order, little- and big-endian; the
    tensors are little-endian and in C order. Reading a tensor holds that one member in memory.

    Raises:
        NotFoundError: if there is no file.
        TruncatedFileError: if the file ends before its directory or before a member's data.
        FormatError: for every other defect, such as an array of objects, a type without a plain
            counterpart, a header that contradicts the zip, or a file that expands too far.
    """
    size = file_size(path)
    with readable(path):
        members = _members(path, size)
        _check_expansion(members, size, path)
        tensors: dict[str, LazyTensor] = {}
        for member in members:
            tensors[member.name.removesuffix(_SUFFIX)] = _tensor(member, path)
    return MappingProxyType(tensors)


def _members(path: Path, size: int) -> list[_Member]:
    with path.open("rb") as file:
        if file.read(len(_LOCAL_MAGIC)) != _LOCAL_MAGIC:
            raise FormatError("is not a zip of numpy.savez, or holds no arrays", path=path)
    members = read_members(FileSlice(path, 0, size))
    for member in members:
        if not member.name.endswith(_SUFFIX):
            raise member.error("is no .npy array: this is no file of numpy.savez")
        if member.method not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise member.error(
                f"is compressed by method {member.method}, which numpy does not write"
            )
        if member.method == zipfile.ZIP_STORED and not member.stored:
            raise member.error("is stored, and yet has two sizes")
    return [_Member(member) for member in members]


def _check_expansion(members: list[_Member], size: int, path: Path) -> None:
    expanded = sum(member.size for member in members)
    if expanded > FREE_BYTES + MAX_RATIO * size:
        raise FormatError(
            f"its {size} bytes expand to {expanded}, more than {MAX_RATIO} times as many: not "
            "trained weights; if you trust the file, save it again with numpy.savez, uncompressed",
            path=path,
            where=max(members, key=lambda member: member.size).name,
        )


def _tensor(member: _Member, path: Path) -> LazyTensor:
    where = member.name
    offset, fields = _header(member, path)
    code, fortran = fields["descr"].strip("'"), fields["fortran_order"] == "True"
    if fields["descr"].startswith("["):
        raise FormatError(f"holds records, not numbers; {_RESAVE}", path=path, where=where)
    if fields["fortran_order"] not in {"True", "False"}:
        raise FormatError("its order is neither True nor False", path=path, where=where)
    if not _SHAPE.fullmatch(fields["shape"]):
        raise FormatError("its shape is not of whole numbers", path=path, where=where)
    shape = tuple(int(size) for size in re.findall(r"\d+", fields["shape"]))
    dtype = _dtype(code, path, where)
    check_shape(dtype, shape, path=path, where=where)
    needed = offset + dtype.nbytes(shape)
    if member.size != needed:
        raise FormatError(
            f"{dtype} {list(shape)} needs {needed} bytes with its header, the zip states "
            f"{member.size}",
            path=path,
            where=where,
        )
    read = _Reader(member, offset, code, dtype, shape, fortran)
    return LazyTensor(dtype, shape, read)


def _dtype(code: str, path: Path, where: str) -> DType:
    if code[1:] == "O":
        raise FormatError(
            f"holds Python objects (type {code}), which only a pickle can rebuild; nothing was "
            f"executed; {_RESAVE}",
            path=path,
            where=where,
        )
    dtype = _TYPES.get(code[1:])
    if dtype is None or code[0] not in "<>|" or (code[0] == "|") != (dtype.block_bytes == 1):
        raise FormatError(f"type {code!r} cannot be read; {_RESAVE}", path=path, where=where)
    return dtype


def _header(member: _Member, path: Path) -> tuple[int, dict[str, str]]:
    """Return where the values begin, and the text of the header's three fields."""
    start = member.start(_PREFIX + MAX_HEADER)
    version = start[6:8] if len(start) >= _PREFIX else b""
    if not start.startswith(_MAGIC) or version not in _LENGTHS:
        raise FormatError("is no .npy array of version 1, 2 or 3", path=path, where=member.name)
    begin = 8 + _LENGTHS[version]
    length = int.from_bytes(start[8:begin], "little")
    if length > MAX_HEADER:
        raise FormatError(
            f"its header has {length} bytes, numpy reads {MAX_HEADER}", path=path, where=member.name
        )
    # Latin-1 gives every byte a letter: what is no ASCII here is no header either.
    text = start[begin : begin + length].decode("latin-1")
    found = _FIELD.findall(text) if _HEADER.fullmatch(text) else []
    if len(text) < length or sorted(name for name, _ in found) != _NAMES:
        raise FormatError("its header is malformed", path=path, where=member.name)
    return begin + length, dict(found)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the values of one member as little-endian bytes in C order."""

    member: _Member
    offset: int
    code: str
    dtype: DType
    shape: tuple[int, ...]
    fortran: bool

    def __call__(self) -> memoryview:
        data = memoryview(self.member.whole())[self.offset :]
        if self.code[0] != ">" and not self.fortran:
            return data
        return encode(self._reordered(data), self.dtype)

    def _reordered(self, data: memoryview) -> np.ndarray[Any, Any]:
        import numpy as np

        array = np.frombuffer(data, dtype=np.dtype(self.code))
        return array.reshape(self.shape, order="F" if self.fortran else "C")
