"""The safetensors container: a JSON header, then the bytes of every tensor without gaps.

The `safetensors` library opens and validates a file; the bytes are read by range. The writer is
ours, because the library wants every tensor in memory and writes wrong values for non-contiguous
arrays (0.8.0).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from adapterkit import strangers
from adapterkit.containers.opening import MAX_AXES, MAX_NAME, check_shape, file_size
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, TruncatedFileError, UnsupportedError
from adapterkit.json_file import json_values
from adapterkit.storage import FileSlice, neighbours, readable
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = 8
MAX_HEADER = 100_000_000
# Eight for each of 250,000 tensors; the models with the most experts have half as many.
MAX_VALUES = 2_000_000
# Free text is a few keys; the reference takes some three hundred bytes for one of ten.
MAX_KEYS = 100_000
# Bytes of a file that are copied at a time.
_CHUNK = 1 << 20
_METADATA = "__metadata__"
_METADATA_KEY = b'"__metadata__"'
_LIBRARY_PREAMBLE = "Error while deserializing header: "
# The reference sorts by descending alignment, and within it by its own list of types.
_ORDER = (
    DType.U64,
    DType.I64,
    DType.F64,
    DType.F32,
    DType.U32,
    DType.I32,
    DType.BF16,
    DType.F16,
    DType.U16,
    DType.I16,
    DType.F8_E8M0,
    DType.F8_E4M3,
    DType.F8_E5M2,
    DType.I8,
    DType.U8,
    DType.BOOL,
)


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """What a safetensors file holds; the data stays on disk.

    Attributes:
        path: the file.
        tensors: every tensor by its name, in the order of the data.
        metadata: the free text of the header.
    """

    path: Path
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]


def read_safetensors(path: Path) -> SafetensorsFile:
    """Check the whole header and leave the data on disk.

    Stricter than the reference in six things: a name may not appear twice, a dtype must be one
    that `DType` has, an empty tensor's other axes must be possible, there are at most `MAX_AXES`
    axes, a name has at most `MAX_NAME` letters, and the header no more than `MAX_VALUES` values.

    Raises:
        NotFoundError: if there is no file.
        TruncatedFileError: if the file ends before its header or its data.
        FormatError: for every other defect; the message names it and the tensor.
    """
    size = file_size(path)
    header = _read_header(path, size)
    _check_count(header, path)
    room = size - PREFIX - len(header)
    metadata = _judged(path, header, room)
    fields = _parse(header, path)
    # Empty tensors share an offset, and stand as the header lists them.
    names = sorted(fields, key=lambda name: fields[name]["data_offsets"])
    begin = PREFIX + len(header)
    tensors = {name: _tensor(name, fields[name], begin, path) for name in names}
    return SafetensorsFile(path, MappingProxyType(tensors), MappingProxyType(metadata))


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> None:
    """Write the bytes that the reference would write, holding one tensor at a time.

    Args:
        path: file to create or replace; wrap it in `output.staged` to have it appear whole.
        tensors: by name, in any order.
        metadata: free text; left out of the file when empty, sorted by key otherwise.

    Raises:
        UnsupportedError: if a tensor has a type or a name that the container cannot hold.
        OSError: as the operating system says; `output.staged` turns it into a WriteError.
    """
    chunks = serialise(tensors, metadata)
    with path.open("wb") as file:
        # Not a for loop: its variable would keep one tensor alive while the next one is read.
        file.writelines(chunks)


def serialise(
    tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> Iterator[bytes | bytearray | memoryview]:
    """Yield the file in pieces: prefix and header, then each tensor, read when it is its turn.

    Raises:
        UnsupportedError: before the first piece, as `write_safetensors`.
    """
    for name, tensor in tensors.items():
        _check_writable(name, tensor)
    rank = {dtype: place for place, dtype in enumerate(_ORDER)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, object] = {}
    if metadata:
        header[_METADATA] = {key: metadata[key] for key in sorted(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype.value,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    return _pieces(_encode_header(header), [tensors[name] for name in names])


def _pieces(header: bytes, tensors: list[LazyTensor]) -> Iterator[bytes | bytearray | memoryview]:
    yield len(header).to_bytes(PREFIX, "little") + header
    for read in neighbours(tensor.source for tensor in tensors):
        if isinstance(read, FileSlice):
            yield from read.chunks(_CHUNK)
        else:
            yield read()


def _encode_header(header: dict[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError("the metadata is not valid Unicode") from error
    data += b" " * (-len(data) % PREFIX)
    if len(data) > MAX_HEADER:
        raise UnsupportedError(f"a header of {len(data)} bytes; readers take at most {MAX_HEADER}")
    return data


def _check_writable(name: str, tensor: LazyTensor) -> None:
    if tensor.dtype not in _ORDER:
        raise UnsupportedError(
            f"safetensors has no {tensor.dtype} tensors; decode it to F32, F16 or BF16", where=name
        )
    if name == _METADATA:
        raise UnsupportedError("this name is reserved by safetensors; rename it", where=name)
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise UnsupportedError("is not valid Unicode; rename it", where=ascii(name))


def _read_header(path: Path, size: int) -> bytes:
    with readable(path), path.open("rb") as file:
        length = int.from_bytes(file.read(PREFIX), "little")
        if size >= PREFIX and length > MAX_HEADER:
            what = (
                f"is no safetensors file: a header of {length} bytes is claimed, the most is "
                f"{MAX_HEADER}"
            )
            raise FormatError(strangers.content(path) or what, path=path)
        if size < PREFIX or length > size - PREFIX:
            raise TruncatedFileError(
                f"the file has {size} bytes and ends within its header; download or copy it again",
                path=path,
            )
        return file.read(length)


def _check_count(header: bytes, path: Path) -> None:
    """Refuse a header that would take far more memory than bytes, before anything reads it."""
    if (count := json_values(header)) > MAX_VALUES:
        raise FormatError(
            f"a header of some {count} values, the most is {MAX_VALUES}: this is no adapter",
            path=path,
        )
    begin = header.find(_METADATA_KEY)
    # The end of the metadata's object, or a brace in its text: then there are more keys than this.
    if begin >= 0 and header.count(b",", begin, header.find(b"}", begin)) > MAX_KEYS:
        raise FormatError(f"more than {MAX_KEYS} keys of metadata", path=path)


def _judged(path: Path, header: bytes, room: int) -> dict[str, str]:
    """Let the reference judge the file; return its metadata."""
    import safetensors

    try:
        # `safe_open` has no typed methods.
        opening = cast("Any", safetensors.safe_open)
        with readable(path), opening(str(path), framework="np") as file:
            metadata: dict[str, str] | None = file.metadata()
    except safetensors.SafetensorError as error:
        raise _defect(header, room, str(error).removeprefix(_LIBRARY_PREAMBLE), path) from error
    return metadata or {}


def _tensor(name: str, info: Mapping[str, Any], begin: int, path: Path) -> LazyTensor:
    """Return a tensor from its entry in the header, which the reference has found right."""
    if len(name) > MAX_NAME:
        raise FormatError(
            f"a name of more than {MAX_NAME} letters", path=path, where=f"{name[:80]}..."
        )
    dtype = DType.__members__.get(info["dtype"])
    if dtype is None:
        raise _unknown_dtype(info["dtype"], path, name)
    shape = tuple(info["shape"])
    check_shape(dtype, shape, path=path, where=name)
    start, end = info["data_offsets"]
    return LazyTensor(dtype, shape, FileSlice(path, begin + start, end - start))


def _unknown_dtype(code: str, path: Path, name: str) -> FormatError:
    known = ", ".join(reversed(_ORDER))
    return FormatError(f"dtype {code} cannot be read; known are {known}", path=path, where=name)


def _parse(header: bytes, path: Path, reason: str | None = None) -> dict[str, Any]:
    """Parse the header again, because the reference lets the last of two equal keys win."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise FormatError("the header has this key twice", path=path, where=twice)
        return fields

    try:
        fields = json.loads(header.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the header is not valid: {reason or error}", path=path) from error
    if not isinstance(fields, dict):
        raise FormatError("the header is not a JSON object", path=path)
    fields = cast("dict[str, Any]", fields)
    fields.pop(_METADATA, None)
    return fields


def _defect(header: bytes, room: int, reason: str, path: Path) -> FormatError:
    """Return the error for a file that the reference rejects, naming the tensor where one is."""
    places: list[tuple[int, int, str]] = []
    for name, info in _parse(header, path, reason).items():
        match info:
            case {
                "dtype": str(code),
                "shape": [*shape],
                "data_offsets": [int(begin), int(end)],
            } if _possible(shape) and _possible([begin, end]):
                places.append((begin, end, name))
                if (wrong := _wrong_size(code, shape, end - begin, path, name)) is not None:
                    return wrong
            case _:
                return FormatError(
                    f"its header entry is malformed: {reason}", path=path, where=name
                )
    return _wrong_place(sorted(places), room, path) or FormatError(
        f"the header is not valid: {reason}", path=path
    )


def _possible(numbers: list[int]) -> bool:
    in_range = all(type(number) is int and 0 <= number < 2**64 for number in numbers)
    return in_range and len(numbers) <= MAX_AXES


def _wrong_size(
    code: str, shape: list[int], length: int, path: Path, name: str
) -> FormatError | None:
    dtype = DType.__members__.get(code)
    if dtype is None:
        return _unknown_dtype(code, path, name)
    needed = math.prod(shape) * dtype.block_bytes
    if length == needed:
        return None
    return FormatError(
        f"{code} {shape} needs {needed} bytes, its offsets span {length}", path=path, where=name
    )


def _wrong_place(places: list[tuple[int, int, str]], room: int, path: Path) -> FormatError | None:
    expected = 0
    for begin, end, name in places:
        if begin != expected:
            kind = "overlaps the tensor before it" if begin < expected else "leaves a gap"
            return FormatError(
                f"its data starts at {begin}, not at {expected}: it {kind}", path=path, where=name
            )
        expected = end
    if expected > room:
        return TruncatedFileError(
            f"{expected - room} of {expected} bytes of data are missing; download or copy it again",
            path=path,
        )
    if expected < room:
        return FormatError(f"{room - expected} bytes belong to no tensor", path=path)
    return None
