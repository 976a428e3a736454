"""What a GGUF header can say: value types, arrays, and the ids of ggml's tensor types."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

from adapterkit.dtype import DType
from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.storage import FileSlice

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
# The specification's limit for keys, and llama.cpp's for the rest (a name has a final NUL there).
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63
MAX_DIMS = 4
MAX_LENGTH = 1 << 30
# Ours: no model comes near, and each costs some hundred bytes of memory for 14 in the file.
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 18

Scalar: TypeAlias = "int | float | bool | str"


class ValueType(IntEnum):
    """The type of a metadata value, by its number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct's letters of the types that have one size.
CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
SIZES = {kind: struct.calcsize(f"<{code}") for kind, code in CODES.items()}
LENGTH = struct.Struct("<Q")

# Numbers that are missing were removed from ggml (4, 5, 31-33, 36-38) or exist only in memory (9).
GGML_TYPES = {
    0: DType.F32,
    1: DType.F16,
    2: DType.Q4_0,
    3: DType.Q4_1,
    6: DType.Q5_0,
    7: DType.Q5_1,
    8: DType.Q8_0,
    10: DType.Q2_K,
    11: DType.Q3_K,
    12: DType.Q4_K,
    13: DType.Q5_K,
    14: DType.Q6_K,
    15: DType.Q8_K,
    16: DType.IQ2_XXS,
    17: DType.IQ2_XS,
    18: DType.IQ3_XXS,
    19: DType.IQ1_S,
    20: DType.IQ4_NL,
    21: DType.IQ3_S,
    22: DType.IQ2_S,
    23: DType.IQ4_XS,
    24: DType.I8,
    25: DType.I16,
    26: DType.I32,
    27: DType.I64,
    28: DType.F64,
    29: DType.IQ1_M,
    30: DType.BF16,
    34: DType.TQ1_0,
    35: DType.TQ2_0,
    39: DType.MXFP4,
    40: DType.NVFP4,
}
GGML_IDS = {dtype: number for number, dtype in GGML_TYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class GGUFArray:
    """An array value that is decoded only when it is asked for, every time anew.

    Two arrays are equal only if they are the same object: compare `values()`.

    Attributes:
        kind: type of the elements; never ARRAY.
        length: number of elements.
        read: returns the encoded elements; a `FileSlice` is copied by the writer in chunks.
    """

    kind: ValueType
    length: int
    read: Callable[[], bytes] = field(repr=False)

    def __len__(self) -> int:
        """Return the number of elements, without reading them."""
        return self.length

    def __iter__(self) -> Iterator[Scalar]:
        """Read the encoded elements, then decode them one by one.

        Raises:
            FormatError: if a string is not UTF-8, or a boolean is neither 0 nor 1.
        """
        data = self.read()
        if self.kind is ValueType.STRING:
            yield from self._strings(data)
            return
        for index, (value,) in enumerate(struct.iter_unpack(f"<{CODES[self.kind]}", data)):
            yield self._boolean(value, index) if self.kind is ValueType.BOOL else value

    def values(self) -> list[Scalar]:
        """Decode all elements; see `__iter__` for the errors."""
        return list(self)

    def _strings(self, data: bytes) -> Iterator[str]:
        at = 0
        for index in range(self.length):
            # Read again since it was checked: the file may be another one by now.
            begin = at + LENGTH.size
            end = begin + int.from_bytes(data[at:begin], "little")
            if end > len(data):
                raise self._broken(f"string {index} ends outside the array")
            text = data[begin:end]
            try:
                yield text.decode()
            except UnicodeDecodeError as error:
                raise self._broken(f"string {index} is not utf-8 ({text[:32]!r})") from error
            at = end
        if at != len(data):
            raise self._broken(f"{self.length} strings end at byte {at} of {len(data)}")

    def _boolean(self, value: int, index: int) -> bool:
        if value > 1:
            raise self._broken(f"boolean {index} is {value}, neither 0 nor 1")
        return bool(value)

    def _broken(self, message: str) -> FormatError:
        path = self.read.path if isinstance(self.read, FileSlice) else None
        return FormatError(message, path=path)


@dataclass(frozen=True, slots=True)
class Typed:
    """A scalar with the type that it has in the file.

    Attributes:
        kind: the type; never ARRAY.
        value: the Python value.
    """

    kind: ValueType
    value: Scalar


GGUFValue: TypeAlias = "str | bool | Typed | GGUFArray"


def uint32(value: int) -> Typed:
    """Mark a number as UINT32, which counts and `general.alignment` are."""
    return Typed(ValueType.UINT32, value)


def int32(value: int) -> Typed:
    """Mark a number as INT32."""
    return Typed(ValueType.INT32, value)


def uint64(value: int) -> Typed:
    """Mark a number as UINT64, which parameter counts are."""
    return Typed(ValueType.UINT64, value)


def float32(value: float) -> Typed:
    """Mark a number as FLOAT32, which `adapter.lora.alpha` must be; it is rounded to that."""
    return Typed(ValueType.FLOAT32, value)


def array(kind: ValueType, values: Iterable[Scalar]) -> GGUFArray:
    """Encode `values` as an array of `kind`, at once and in memory.

    Raises:
        UnsupportedError: if a value is not of that type, or `kind` is ARRAY: engines refuse that.
    """
    chunks: list[bytes] = []
    for index, value in enumerate(values):
        try:
            chunks.append(encode_scalar(kind, value))
        except UnsupportedError as error:
            raise UnsupportedError(f"element {index}: {error.message}") from error
    if kind is ValueType.ARRAY:
        raise UnsupportedError("engines refuse arrays of arrays; flatten them")
    data = b"".join(chunks)
    return GGUFArray(kind, len(chunks), lambda: data)


def encode_scalar(kind: ValueType, value: Scalar) -> bytes:
    """Return the bytes of one value, without its type.

    Raises:
        UnsupportedError: if `value` is not of that type or out of its range.
    """
    if kind is ValueType.STRING and isinstance(value, str):
        return encode_text(value)
    if kind in CODES and isinstance(value, bool) is (kind is ValueType.BOOL):
        try:
            return struct.pack(f"<{CODES[kind]}", value)
        except (struct.error, OverflowError) as error:
            message = f"{value!r} is no {kind.name} value ({error})"
            raise UnsupportedError(message) from error
    raise UnsupportedError(f"{value!r} is no {kind.name} value")


def encode_text(text: str) -> bytes:
    """Return a string with its length before it.

    Raises:
        UnsupportedError: if `text` has half of a surrogate pair, which UTF-8 cannot hold.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"{text[:32]!r} cannot be written as utf-8") from error
    if len(data) > MAX_LENGTH:
        raise UnsupportedError(f"a string of {len(data)} bytes is longer than the limit of 2^30")
    return LENGTH.pack(len(data)) + data
