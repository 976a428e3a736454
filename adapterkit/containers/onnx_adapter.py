"""The container of onnxruntime's adapters: a FlatBuffer of named tensors, and nothing else.

    table Parameter { name: string; dims: [int64]; data_type: int32; raw_data: [uint8]; }
    table Adapter { format_version: int32; adapter_version: int32; model_version: int32;
                    parameters: [Parameter]; }
    file_identifier "TORT"

(onnxruntime/lora/adapter_format/adapter_schema.fbs). Tables are read by range, as far as they name
tensors; the writer puts them all before the data, which is then written tensor by tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO

from adapterkit.containers.opening import MAX_AXES, MAX_NAME, check_shape, file_size
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, TruncatedFileError, UnsupportedError
from adapterkit.storage import FileSlice, readable
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

IDENTIFIER, IDENTIFIER_AT = b"TORT", 4
_FORMAT_VERSION = 1
# What onnxruntime's verifier takes; its offsets are signed.
MAX_BYTES = (1 << 31) - 1
MAX_PARAMETERS = 250_000
# Numbers of ONNX's TensorProto.DataType that onnxruntime takes, float8 aside.
_TYPES: Mapping[int, DType] = MappingProxyType(
    {
        1: DType.F32,
        2: DType.U8,
        3: DType.I8,
        4: DType.U16,
        5: DType.I16,
        6: DType.I32,
        7: DType.I64,
        10: DType.F16,
        11: DType.F64,
        12: DType.U32,
        13: DType.U64,
        16: DType.BF16,
    }
)
_NUMBERS = {dtype: number for number, dtype in _TYPES.items()}
_OFFSET, _FIELD, _INT64 = 4, 2, 8
# Fields of the two tables, in their order.
_FORMAT, _ADAPTER, _MODEL, _PARAMETERS = range(4)
_NAME, _DIMS, _TYPE, _DATA = range(4)
# One table of field offsets for both, since both have four fields of four bytes.
_LAYOUT = struct.pack("<6H", 12, 20, 4, 8, 12, 16)
_TABLE = struct.Struct("<5i")


@dataclass(frozen=True, slots=True)
class OnnxAdapterFile:
    """What a file holds; the data stays on disk.

    Attributes:
        path: the file.
        tensors: every parameter by its name, in the order of the file.
        adapter_version: whatever the writer put there, 0 by default.
        model_version: likewise.
    """

    path: Path
    tensors: Mapping[str, LazyTensor]
    adapter_version: int
    model_version: int


def read_onnx_adapter(path: Path) -> OnnxAdapterFile:
    """Check every table and leave the data on disk.

    Refuses what onnxruntime's verifier refuses, and four things more: a name twice, data that is
    not of its shape's size, data of two parameters that overlap, and more than `MAX_PARAMETERS`.

    Raises:
        NotFoundError: if there is no file.
        TruncatedFileError: if the file ends before what it points at.
        UnsupportedError: if it is of another version than 1.
        FormatError: for every other defect; the message names it and the parameter.
    """
    size = file_size(path)
    with readable(path), path.open("rb") as file:
        return _Buffer(file, size, path).adapter()


def write_onnx_adapter(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    adapter_version: int = 0,
    model_version: int = 0,
) -> None:
    """Write parameters sorted by name, holding one tensor at a time.

    Args:
        path: file to create or replace; wrap it in `output.staged` to have it appear whole.
        tensors: by name, in any order.
        adapter_version: kept for the user; onnxruntime does not look at it.
        model_version: likewise.

    Raises:
        UnsupportedError: if a tensor has no axes or a type that onnxruntime does not take, or the
            file would reach 2 GiB.
        OSError: as the operating system says; `output.staged` turns it into a WriteError.
    """
    names = sorted(tensors)
    ordered = [tensors[name] for name in names]
    for name, tensor in zip(names, ordered, strict=True):
        if tensor.dtype not in _NUMBERS:
            message = f"onnxruntime takes no {tensor.dtype} here; decode it to F32, F16 or BF16"
            raise UnsupportedError(message, where=name)
        if not tensor.shape:
            raise UnsupportedError("has no axes, which onnxruntime refuses", where=name)
    versions = (_FORMAT_VERSION, adapter_version, model_version)
    head, begins = _laid_out(names, ordered, versions)
    end = begins[-1] + ordered[-1].nbytes if begins else len(head)
    if end > MAX_BYTES:
        raise UnsupportedError(
            f"an .onnx_adapter of {end} bytes; onnxruntime takes at most {MAX_BYTES}", path=path
        )
    with path.open("wb") as file:
        file.writelines(_pieces(head, begins, ordered))


def _laid_out(
    names: Sequence[str], tensors: Sequence[LazyTensor], versions: tuple[int, int, int]
) -> tuple[bytes, list[int]]:
    """Return everything but the data, and where the data of each parameter begins."""
    head = bytearray(_OFFSET) + IDENTIFIER
    layout = len(head)
    head += _LAYOUT
    root = len(head)
    head += _TABLE.pack(root - layout, *versions, 4)  # the vector follows its field
    struct.pack_into("<I", head, 0, root)
    slots = len(head) + _OFFSET
    head += struct.pack("<I", len(names)) + bytes(_OFFSET * len(names))
    links: list[int] = []
    for place, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        table = len(head)
        struct.pack_into("<I", head, slots + _OFFSET * place, table - slots - _OFFSET * place)
        text = name.encode()
        vector = table + _TABLE.size + _OFFSET + len(text) + 1
        # The numbers after a length of four bytes stand on a multiple of eight.
        vector += -(vector + _OFFSET) % _INT64
        offsets = (_TABLE.size - 4, vector - table - 8)
        head += _TABLE.pack(table - layout, *offsets, _NUMBERS[tensor.dtype], 0)
        head += struct.pack("<I", len(text)) + text
        head += bytes(vector - len(head))
        head += struct.pack(f"<I{len(tensor.shape)}q", len(tensor.shape), *tensor.shape)
        links.append(table + 16)
    begins: list[int] = []
    end = len(head)
    for link, tensor in zip(links, tensors, strict=True):
        begin = end + _OFFSET + -(end + _OFFSET) % _INT64
        struct.pack_into("<I", head, link, (begin - _OFFSET - link) & 0xFFFFFFFF)
        begins.append(begin)
        end = begin + tensor.nbytes
    return bytes(head), begins


def _pieces(
    head: bytes, begins: Sequence[int], tensors: Sequence[LazyTensor]
) -> Iterator[bytes | bytearray | memoryview]:
    yield head
    end = len(head)
    for begin, tensor in zip(begins, tensors, strict=True):
        yield bytes(begin - _OFFSET - end) + struct.pack("<I", tensor.nbytes)
        yield tensor.tobytes()
        end = begin + tensor.nbytes


@dataclass(frozen=True, slots=True)
class _Buffer:
    """An open file, of which no byte is believed before it is looked at.

    Attributes:
        file: as opened.
        size: in bytes.
        path: for messages.
    """

    file: BinaryIO
    size: int
    path: Path

    def adapter(self) -> OnnxAdapterFile:
        """Read the root table and all that it points at."""
        if self.size > MAX_BYTES:
            raise self.wrong(f"has {self.size} bytes; onnxruntime takes at most {MAX_BYTES}")
        if self.bytes_at(IDENTIFIER_AT, len(IDENTIFIER)) != IDENTIFIER:
            raise self.wrong("has no TORT at byte 4: this is no adapter of onnxruntime")
        root = self.table(self.follow(0))
        if (version := self.number(root, _FORMAT)) != _FORMAT_VERSION:
            message = f"is of version {version}; version {_FORMAT_VERSION} can be read"
            raise UnsupportedError(message, path=self.path)
        tensors: dict[str, LazyTensor] = {}
        for table in self.tables(root):
            name, tensor = self.parameter(table)
            if name in tensors:
                raise self.wrong("is there twice", name)
            tensors[name] = tensor
        self.check_apart(tensors)
        versions = self.number(root, _ADAPTER), self.number(root, _MODEL)
        return OnnxAdapterFile(self.path, MappingProxyType(tensors), *versions)

    def tables(self, root: Mapping[int, int]) -> list[Mapping[int, int]]:
        """Return the parameters' tables."""
        if _PARAMETERS not in root:
            raise self.wrong("has no list of parameters")
        begin, count = self.vector(self.follow(root[_PARAMETERS]), _OFFSET)
        if count > MAX_PARAMETERS:
            raise self.wrong(f"holds {count} parameters, the most is {MAX_PARAMETERS}")
        return [self.table(self.follow(begin + _OFFSET * place)) for place in range(count)]

    def parameter(self, table: Mapping[int, int]) -> tuple[str, LazyTensor]:
        """Return the name and the tensor of a parameter."""
        name = self.text(table)
        if _DIMS not in table or _DATA not in table:
            raise self.wrong("has no shape or no data", name)
        begin, count = self.vector(self.follow(table[_DIMS]), _INT64)
        if not 0 < count <= MAX_AXES:
            raise self.wrong(f"has {count} axes; 1 to {MAX_AXES} can be read", name)
        shape = struct.unpack(f"<{count}q", self.bytes_at(begin, _INT64 * count))
        number = self.number(table, _TYPE)
        dtype = _TYPES.get(number)
        if dtype is None:
            raise self.wrong(f"is of ONNX's data type {number}, which cannot be read", name)
        check_shape(dtype, shape, path=self.path, where=name)
        begin, length = self.vector(self.follow(table[_DATA]), 1)
        if length != dtype.nbytes(shape):
            needed = f"{dtype} {list(shape)} needs {dtype.nbytes(shape)} bytes"
            raise self.wrong(f"{needed}, it has {length}", name)
        return name, LazyTensor(dtype, shape, FileSlice(self.path, begin, length))

    def text(self, table: Mapping[int, int]) -> str:
        """Return a parameter's name, which ends in a zero byte that is none of it."""
        if _NAME not in table:
            raise self.wrong("holds a parameter without a name")
        begin, length = self.vector(self.follow(table[_NAME]), 1)
        if not 0 < length <= MAX_NAME:
            raise self.wrong(f"a name of {length} letters; 1 to {MAX_NAME} can be read")
        data = self.bytes_at(begin, length + 1)
        try:
            name = data[:-1].decode()
        except UnicodeDecodeError:
            raise self.wrong("its name is no UTF-8 text", ascii(data[:-1])) from None
        if data[-1]:
            raise self.wrong("its name does not end in a zero byte", name)
        return name

    def check_apart(self, tensors: Mapping[str, LazyTensor]) -> None:
        """Refuse data that two parameters share: few bytes would be many."""
        spans = sorted(
            (tensor.read.offset, tensor.nbytes, name)
            for name, tensor in tensors.items()
            if tensor.nbytes and isinstance(tensor.read, FileSlice)
        )
        end = 0
        for begin, length, name in spans:
            if begin < end:
                raise self.wrong("its data overlaps another parameter's", name)
            end = begin + length

    def table(self, begin: int) -> Mapping[int, int]:
        """Return where the fields of a table stand, those that are there."""
        (back,) = struct.unpack("<i", self.bytes_at(begin, _OFFSET, aligned=_OFFSET))
        layout = begin - back
        (length,) = struct.unpack("<H", self.bytes_at(layout, _FIELD, aligned=_FIELD))
        if length % _FIELD or length < 2 * _FIELD:
            raise self.wrong(f"the field list at byte {layout} has an impossible size of {length}")
        fields = struct.unpack(f"<{length // _FIELD}H", self.bytes_at(layout, length))[2:6]
        return {place: begin + offset for place, offset in enumerate(fields) if offset}

    def number(self, table: Mapping[int, int], field: int) -> int:
        """Return an int32, 0 where it is left out."""
        if field not in table:
            return 0
        data = self.bytes_at(table[field], _OFFSET, aligned=_OFFSET)
        return int.from_bytes(data, "little", signed=True)

    def follow(self, place: int) -> int:
        """Return where an offset points."""
        data = self.bytes_at(place, _OFFSET, aligned=_OFFSET)
        offset = int.from_bytes(data, "little")
        if not 0 < offset <= MAX_BYTES:
            raise self.wrong(f"the offset at byte {place} is {offset}")
        return place + offset

    def vector(self, place: int, width: int) -> tuple[int, int]:
        """Return where the elements of a vector begin, and how many there are."""
        count = int.from_bytes(self.bytes_at(place, _OFFSET, aligned=_OFFSET), "little")
        begin = place + _OFFSET
        if count > (self.size - begin) // width:
            raise self.ends_before(begin + count * width)
        return begin, count

    def bytes_at(self, begin: int, length: int, *, aligned: int = 1) -> bytes:
        """Return bytes of the file, or refuse a place that is outside or crooked."""
        if begin < 0 or begin % aligned:
            raise self.wrong(f"points at byte {begin}, where nothing can be")
        if begin + length > self.size:
            raise self.ends_before(begin + length)
        self.file.seek(begin)
        data = self.file.read(length)
        if len(data) != length:
            raise self.ends_before(begin + length)
        return data

    def wrong(self, message: str, where: str | None = None) -> FormatError:
        """Return an error about this file."""
        return FormatError(message, path=self.path, where=where)

    def ends_before(self, end: int) -> TruncatedFileError:
        """Return the error for a file that is shorter than it says."""
        return TruncatedFileError(
            f"the file has {self.size} bytes, and points at byte {end}; download or copy it again",
            path=self.path,
        )
