"""What the GGUF writer refuses, and how it copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from gguf_oracle import accepted_by_llama_cpp, saved
from gguf_tensors import tensor

from adapterkit.containers.gguf import (
    GGUFArray,
    Typed,
    ValueType,
    array,
    float32,
    read_gguf,
    uint32,
    uint64,
    write_gguf,
)
from adapterkit.containers.gguf_values import GGML_TYPES
from adapterkit.dtype import DType
from adapterkit.errors import (
    DestinationExistsError,
    FormatError,
    TruncatedFileError,
    UnsupportedError,
    UsageError,
)
from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor
from fixtures.generators import gguf as generator

if TYPE_CHECKING:
    from pathlib import Path

SOUND = generator.file()
STORABLE = tuple(GGML_TYPES.values())


def test_a_byte_range_of_another_size_is_not_copied(tmp_path: Path) -> None:
    source = saved(tmp_path, SOUND)
    wrong = LazyTensor(DType.F32, (8,), FileSlice(source, 0, 31))
    with pytest.raises(ValueError, match="got 31 bytes"):
        write_gguf(tmp_path / "new.gguf", {}, {"w": wrong})


def test_a_source_that_shrank_is_named_while_it_is_copied(tmp_path: Path) -> None:
    source = saved(tmp_path, SOUND)
    file = read_gguf(source)
    source.write_bytes(SOUND[:-1])
    with pytest.raises(TruncatedFileError, match="the file ends before byte 224"):
        write_gguf(tmp_path / "new.gguf", file.typed(), file.tensors)


def test_a_file_is_never_written_over_its_own_source(tmp_path: Path) -> None:
    source = saved(tmp_path, SOUND)
    file = read_gguf(source)
    with pytest.raises(DestinationExistsError):
        write_gguf(source, file.typed(), file.tensors)
    assert source.read_bytes() == SOUND


def test_alignment_is_said_once_and_followed(tmp_path: Path) -> None:
    path, again = tmp_path / "new.gguf", tmp_path / "again.gguf"
    write_gguf(path, {}, {"a": tensor(DType.F32, 3), "b": tensor(DType.F32, 3)}, alignment=128)
    file = read_gguf(path)
    assert file.alignment == file.metadata["general.alignment"] == 128
    assert file.data_offset % 128 == 0
    assert path.stat().st_size == file.data_offset + 256
    write_gguf(again, file.typed(), file.tensors)
    assert again.read_bytes() == path.read_bytes()
    assert accepted_by_llama_cpp(path) == [True]


@pytest.mark.parametrize(
    ("metadata", "alignment", "message"),
    [
        ({"general.alignment": uint32(64)}, 32, "must be UINT32 32, not"),
        ({"general.alignment": uint64(64)}, None, "must be a UINT32, not"),
        ({"general.alignment": uint32(48)}, None, "48 is not a power of two"),
        ({}, 0, "0 is not a power of two"),
        ({}, 1 << 32, "4294967296 is not a power of two below"),
    ],
)
def test_a_contradictory_alignment_is_refused(
    tmp_path: Path, metadata: dict[str, Any], alignment: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        write_gguf(tmp_path / "new.gguf", metadata, {}, alignment=alignment)
    assert caught.value.where == "general.alignment"


@pytest.mark.parametrize(
    ("name", "item", "message"),
    [
        ("", tensor(DType.F32, 1), "1 to 63 bytes"),
        ("n" * 64, tensor(DType.F32, 1), "1 to 63 bytes and no NUL; this one 64"),
        ("Δ" * 32, tensor(DType.F32, 1), "this one 64"),
        ("a\0b", tensor(DType.F32, 1), "no NUL"),
        ("\ud800", tensor(DType.F32, 1), "cannot be written as utf-8"),
        ("w", tensor(DType.F32, 1, 1, 1, 1, 1), "more than 4 dimensions"),
        ("w", tensor(DType.F32, 4, 0), "is empty, which crashes engines"),
        ("w", tensor(DType.Q8_0, 2, 48), "rows of 48 elements do not hold whole Q8_0 blocks"),
        *[
            ("w", LazyTensor(dtype, (1,), bytes), f"GGUF has no {dtype} tensors")
            for dtype in DType
            if dtype not in STORABLE
        ],
    ],
)
def test_a_tensor_that_gguf_cannot_hold_is_refused_before_writing(
    tmp_path: Path, name: str, item: LazyTensor, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        write_gguf(tmp_path / "new.gguf", {}, {name: item})
    assert caught.value.where == (name or "tensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (uint32(-1), "-1 is no UINT32 value"),
        (uint32(2**32), "is no UINT32 value"),
        (Typed(ValueType.UINT32, 1.5), "1.5 is no UINT32 value"),
        (Typed(ValueType.UINT32, value=True), "True is no UINT32 value"),
        (Typed(ValueType.BOOL, 1), "1 is no BOOL value"),
        (Typed(ValueType.STRING, 1), "1 is no STRING value"),
        (Typed(ValueType.ARRAY, 1), "1 is no ARRAY value"),
        (float32(1e300), "1e[+]300 is no FLOAT32 value"),
        ("\ud800", "cannot be written as utf-8"),
        (GGUFArray(ValueType.UINT32, 2, lambda: bytes(4)), "2 UINT32 take 8 bytes, not 4"),
        (GGUFArray(ValueType.ARRAY, 1, bytes), "engines refuse arrays of arrays"),
        (GGUFArray(ValueType.UINT8, 1 << 31, bytes), "more than the limit"),
    ],
)
def test_a_value_that_gguf_cannot_hold_is_refused_before_writing(
    tmp_path: Path, value: Any, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        write_gguf(tmp_path / "new.gguf", {"some.key": value}, {})
    assert caught.value.where == "some.key"
    assert not list(tmp_path.iterdir())


def test_numbers_without_a_type_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    values: list[Any] = [1, 1.5, None, ["a"]]
    for value in values:
        with pytest.raises(TypeError, match=r"needs a type, such as uint32"):
            write_gguf(tmp_path / "new.gguf", {"some.key": value}, {})


def test_array_names_the_element_that_does_not_fit() -> None:
    with pytest.raises(UnsupportedError, match="element 1: 300 is no UINT8 value"):
        array(ValueType.UINT8, [1, 300])
    with pytest.raises(UnsupportedError, match="arrays of arrays"):
        array(ValueType.ARRAY, [])


def test_a_long_key_is_refused_both_ways(tmp_path: Path) -> None:
    entry = generator.entry(b"k" * 65536, generator.UINT32, bytes(4))
    with pytest.raises(FormatError, match="65536 bytes; the limit is 65535"):
        read_gguf(saved(tmp_path, generator.file(entries=(entry,))))
    with pytest.raises(UnsupportedError, match="a metadata key has 1 to 65535 bytes"):
        write_gguf(tmp_path / "new.gguf", {"k" * 65536: True}, {})
