"""Writing GGUF files: version 3, little-endian, one tensor in memory at a time."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from adapterkit.containers.gguf_values import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    GGML_IDS,
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
    Typed,
    ValueType,
    encode_scalar,
    encode_text,
    uint32,
)
from adapterkit.errors import (
    DestinationExistsError,
    UnsupportedError,
    UsageError,
)
from adapterkit.storage import FileSlice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from io import BufferedWriter
    from pathlib import Path

    from adapterkit.tensor import LazyTensor

_CHUNK = 1 << 20
_MAX_ALIGNMENT = 1 << 31


def write_gguf(
    path: Path,
    metadata: Mapping[str, GGUFValue],
    tensors: Mapping[str, LazyTensor],
    *,
    alignment: int | None = None,
) -> None:
    """Write a new file in the mappings' order; byte ranges of files are copied in chunks.

    Everything that can be checked without reading tensors is checked before the file is made. A
    later failure leaves a partial file: write inside `output.staged`.

    Args:
        path: a file that does not exist yet.
        metadata: `str` and `bool` are written as such, numbers need a type (`uint32(1)`), arrays
            come from `array` or from another file.
        tensors: tensors by name, shapes in C order.
        alignment: bytes that each tensor's start is a multiple of. If omitted it is what
            `general.alignment` says, or 32; if it is not 32 the key is added.

    Raises:
        UnsupportedError: if a value, name, shape or dtype cannot be held by GGUF; names it.
        UsageError: if `alignment` contradicts `general.alignment` or is no power of two.
        DestinationExistsError: if `path` exists; it may be where the tensors come from.
        TruncatedFileError: if a file that is copied from has become shorter.
        TypeError: if a number comes without a type.
    """
    header, alignment = _header(metadata, tensors, alignment)
    try:
        file = path.open("xb")
    except FileExistsError as error:
        raise DestinationExistsError("exists already; write to a new path", path=path) from error
    with file:
        _stream(file, header, tensors.values(), alignment)


def gguf_layout(
    metadata: Mapping[str, GGUFValue],
    tensors: Mapping[str, LazyTensor],
    *,
    alignment: int | None = None,
) -> tuple[list[bytes | FileSlice], list[int], int]:
    """Return what `write_gguf` would write before the tensors, and where everything stands.

    Args:
        metadata: as `write_gguf` takes it.
        tensors: types and shapes count; nothing is read.
        alignment: as `write_gguf` takes it.

    Returns:
        The first bytes of the file in parts, the offset of each tensor, and the size of the file.

    Raises:
        UnsupportedError: as `write_gguf`.
        UsageError: as `write_gguf`.
    """
    found, alignment = _header(metadata, tensors, alignment)
    header = [part if isinstance(part, (bytes, FileSlice)) else part() for part in found]
    at = sum(len(part) if isinstance(part, bytes) else part.length for part in header)
    at += -at % alignment
    offsets: list[int] = []
    for tensor in tensors.values():
        offsets.append(at)
        at += tensor.nbytes + -tensor.nbytes % alignment
    return header, offsets, at


def _header(
    metadata: Mapping[str, GGUFValue], tensors: Mapping[str, LazyTensor], alignment: int | None
) -> tuple[list[bytes | Callable[[], bytes]], int]:
    """Return everything before the tensors, arrays as a way to read them, and the alignment."""
    entries = dict(metadata)
    alignment = _agreed_alignment(entries, alignment)
    if len(entries) > MAX_ENTRIES or len(tensors) > MAX_TENSORS:
        raise UnsupportedError(
            f"{len(entries)} metadata entries and {len(tensors)} tensors; "
            f"the limits are {MAX_ENTRIES} and {MAX_TENSORS}"
        )
    header: list[bytes | Callable[[], bytes]] = [
        MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(entries)),
        *(piece for key, value in entries.items() for piece in _entry(key, value)),
        *_table(tensors, alignment),
    ]
    return header, alignment


def _stream(
    out: BufferedWriter,
    header: Iterable[bytes | Callable[[], bytes]],
    tensors: Iterable[LazyTensor],
    alignment: int,
) -> None:
    for piece in header:
        _copy(piece, out)
    _pad(out, alignment)
    for tensor in tensors:
        _copy(tensor.source, out)
        _pad(out, alignment)
    # A hole at the end is not part of the file until its size says so.
    out.truncate()


def _agreed_alignment(entries: dict[str, GGUFValue], alignment: int | None) -> int:
    """Return the alignment; add its key to `entries` if engines would assume another."""
    match entries.get(ALIGNMENT_KEY):
        case None:
            alignment = DEFAULT_ALIGNMENT if alignment is None else alignment
            if alignment != DEFAULT_ALIGNMENT:
                entries[ALIGNMENT_KEY] = uint32(alignment)
        case Typed(ValueType.UINT32, int(recorded)) if alignment in {None, recorded}:
            alignment = recorded
        case other:
            expected = "a UINT32" if alignment is None else f"UINT32 {alignment}"
            raise UsageError(f"must be {expected}, not {other!r}", where=ALIGNMENT_KEY)
    if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise UsageError(f"{alignment} is not a power of two below 2^32", where=ALIGNMENT_KEY)
    return alignment


def _entry(key: str, value: GGUFValue) -> Iterator[bytes | Callable[[], bytes]]:
    """Yield the encoded key, type and value; an array's elements as a way to read them."""
    try:
        name = _encode_key(key)
        match value:
            case GGUFArray(kind, length):
                _check_array(value)
                yield name + struct.pack("<IIQ", ValueType.ARRAY, kind, length)
                yield value.read
            case Typed(kind, content):
                yield name + struct.pack("<I", kind) + encode_scalar(kind, content)
            case bool():
                yield name + struct.pack("<I?", ValueType.BOOL, value)
            case str():
                yield name + struct.pack("<I", ValueType.STRING) + encode_text(value)
            case _:  # pyright: ignore[reportUnnecessaryComparison]  (callers without a type checker)
                raise TypeError(f"{key}: {value!r} needs a type, such as uint32(...) or array(...)")
    except UnsupportedError as error:
        raise UnsupportedError(error.message, where=key[:200] or "metadata") from error


def _encode_key(key: str) -> bytes:
    encoded = encode_text(key)
    length = len(encoded) - LENGTH.size
    if not 0 < length <= MAX_KEY_BYTES:
        raise UnsupportedError(f"a metadata key has 1 to {MAX_KEY_BYTES} bytes; this one {length}")
    return encoded


def _check_array(array: GGUFArray) -> None:
    if array.kind is ValueType.ARRAY:
        raise UnsupportedError("engines refuse arrays of arrays; flatten them")
    if array.length > MAX_LENGTH:
        raise UnsupportedError(f"{array.length} elements are more than the limit of 2^30")
    size = SIZES.get(array.kind)
    held = array.read.length if isinstance(array.read, FileSlice) else len(array.read())
    if size and held != size * array.length:
        raise UnsupportedError(
            f"{array.length} {array.kind.name} take {size * array.length} bytes, not {held}"
        )


def _table(tensors: Mapping[str, LazyTensor], alignment: int) -> Iterator[bytes]:
    """Yield the table's rows, with offsets that are the running sum of padded sizes."""
    offset = 0
    for name, tensor in tensors.items():
        try:
            encoded = encode_text(name)
            _check_tensor(encoded[LENGTH.size :], tensor)
        except UnsupportedError as error:
            raise UnsupportedError(error.message, where=name[:200] or "tensors") from error
        rank = len(tensor.shape)
        yield encoded + struct.pack(
            f"<I{rank}QIQ", rank, *reversed(tensor.shape), GGML_IDS[tensor.dtype], offset
        )
        offset += tensor.nbytes + -tensor.nbytes % alignment


def _check_tensor(name: bytes, tensor: LazyTensor) -> None:
    dtype, shape = tensor.dtype, tensor.shape
    if not 0 < len(name) <= MAX_NAME_BYTES or b"\0" in name:
        raise UnsupportedError(
            f"a GGUF tensor name has 1 to {MAX_NAME_BYTES} bytes and no NUL; this one {len(name)}"
        )
    if dtype not in GGML_IDS:
        raise UnsupportedError(f"GGUF has no {dtype} tensors; cast it to F32, F16 or BF16")
    if len(shape) > MAX_DIMS:
        raise UnsupportedError(f"shape {list(shape)} has more than {MAX_DIMS} dimensions")
    if any(size < 1 for size in shape):
        # llama.cpp divided by the size until 2026, and aborts on a rank of 0 to this day.
        raise UnsupportedError(f"shape {list(shape)} is empty, which crashes engines; leave it out")
    row = shape[-1] if shape else 1
    if row % dtype.block:
        raise UnsupportedError(
            f"rows of {row} elements do not hold whole {dtype} blocks of {dtype.block}; "
            "write it as F16 or F32"
        )


def _copy(piece: bytes | Callable[[], bytes | bytearray | memoryview], out: BufferedWriter) -> None:
    if isinstance(piece, bytes):
        out.write(piece)
    elif isinstance(piece, FileSlice):
        out.writelines(piece.chunks(_CHUNK))
    else:
        out.write(piece())


def _pad(out: BufferedWriter, alignment: int) -> None:
    """Move to the next aligned byte; what is skipped reads as zeros."""
    at = out.tell()
    out.seek(at + -at % alignment)
