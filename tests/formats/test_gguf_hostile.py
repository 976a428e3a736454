"""Broken GGUF files: each is refused by name, at once and in little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from gguf_oracle import accepted_by_llama_cpp, saved

from adapterkit.containers.gguf import (
    GGUFArray,
    read_gguf,
)
from adapterkit.errors import (
    AdapterKitError,
    FormatError,
    NotFoundError,
    TruncatedFileError,
)
from fixtures.generators import gguf as generator

FIXTURES = Path(__file__).parents[2] / "fixtures"
MEGABYTE = 1 << 20
SOUND = generator.file()

# Every hostile file: the error, and what its message says.
HOSTILE: dict[str, tuple[type[AdapterKitError], str]] = {
    "zero-bytes": (TruncatedFileError, "the file is empty"),
    "truncated-magic": (TruncatedFileError, "the magic would end at byte 4"),
    "wrong-magic": (FormatError, "starts with b'GGML', not b'GGUF'"),
    "big-endian": (FormatError, "is big-endian"),
    "version-0": (FormatError, "is GGUF version 0"),
    "version-1": (FormatError, "is GGUF version 1; only 2 and 3"),
    "version-4": (FormatError, "is GGUF version 4"),
    "truncated-header": (TruncatedFileError, "but the file has 66 bytes"),
    "tensor-count-2-40": (TruncatedFileError, "1099511627776 tensors"),
    "entry-count-2-40": (TruncatedFileError, "1099511627776 metadata entries"),
    "truncated-data": (TruncatedFileError, "second: F32 data of shape [8]"),
    "truncated-padding": (TruncatedFileError, "first: F32 data of shape [0]"),
    "empty-key": (FormatError, "metadata key 1 is empty"),
    "key-not-utf8": (FormatError, "a metadata key is not utf-8"),
    "duplicate-key": (FormatError, "some.key: the metadata key appears twice"),
    "unknown-value-type": (FormatError, "some.key: value type 13 is unknown"),
    "boolean-2": (FormatError, "some.key: the boolean is 2"),
    "string-not-utf8": (FormatError, "some.key: a string is not utf-8"),
    "string-past-eof": (TruncatedFileError, "some.key: a string would end at byte 1096"),
    "string-length-2-62": (TruncatedFileError, "some.key: a string would end"),
    "array-length-2-40": (TruncatedFileError, "an.array: an array of 1099511627776 UINT8"),
    "string-array-length-2-40": (TruncatedFileError, "an array of 1099511627776 STRING"),
    "array-string-past-eof": (TruncatedFileError, "an.array: string 1 of an array of 2"),
    "array-last-string-past-eof": (TruncatedFileError, "an.array: an array of 1 strings"),
    "array-string-length-2-64": (TruncatedFileError, "an.array: string 1 of an array of 2"),
    "unknown-array-type": (FormatError, "an.array: value type 13 is unknown"),
    "nested-array": (FormatError, "an.array: the array holds arrays"),
    "bad-alignment": (FormatError, "general.alignment: 48 is not a power of two"),
    "zero-alignment": (FormatError, "general.alignment: 0 is not a power of two"),
    "alignment-not-uint32": (FormatError, "general.alignment: must be UINT32 but is STRING"),
    "duplicate-tensor": (FormatError, "first: the tensor name appears twice"),
    "empty-name": (FormatError, "tensor 0 is named ''"),
    "name-too-long": (FormatError, "has 64 bytes; the limit is 63"),
    "name-not-utf8": (FormatError, "a tensor name is not utf-8"),
    "name-with-nul": (FormatError, "without NUL"),
    "five-dims": (FormatError, "first: has 5 dimensions"),
    "element-count-2-40": (TruncatedFileError, "first: F32 data of shape [1048576, 1048576]"),
    "element-count-wraps": (FormatError, "[4294967296, 4294967296] is larger than memory"),
    "negative-dim": (FormatError, "first: has an axis of impossible size"),
    "unknown-type": (FormatError, "first: ggml type 999 is unknown"),
    "removed-type": (FormatError, "first: ggml type 4 is unknown or was removed"),
    "row-not-multiple-of-block": (FormatError, "rows of 8 elements do not hold whole Q8_0 blocks"),
    "overlapping-offsets": (FormatError, "second: data starts at offset 0, not 32"),
    "gap": (FormatError, "second: data starts at offset 64, not 32"),
    "unaligned-offset": (FormatError, "second: data starts at offset 33, not 32"),
    "reordered-offsets": (FormatError, "first: data starts at offset 32, not 0"),
    "offset-wraps": (FormatError, "second: data starts at offset 18446744073709551584"),
}
# What llama.cpp's parser lets through: text is bytes there, and sizes are compared when data loads.
STRICTER = {
    "boolean-2",
    "element-count-2-40",
    "empty-name",
    "key-not-utf8",
    "name-not-utf8",
    "name-with-nul",
    "string-not-utf8",
    "truncated-data",
}


def fixture(name: str) -> Path:
    return FIXTURES / f"hostile/gguf/{name}.gguf"


def test_every_hostile_file_is_listed_and_up_to_date() -> None:
    made = generator.files()
    found = {
        f"hostile/gguf/{path.name}": path.read_bytes()
        for path in (FIXTURES / "hostile/gguf").iterdir()
    }
    assert found == made
    assert {Path(path).stem for path in made} == HOSTILE.keys()
    assert max(map(len, made.values())) < 1024


@pytest.mark.parametrize(("name", "error", "message"), [(k, *v) for k, v in HOSTILE.items()])
def test_a_hostile_file_is_refused_by_name(
    name: str, error: type[AdapterKitError], message: str
) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(error) as caught:
            read_gguf(fixture(name))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert caught.value.path == fixture(name)
    assert peak < MEGABYTE


def test_whatever_llama_cpp_refuses_is_hostile_and_the_sound_file_is_not(tmp_path: Path) -> None:
    sound = saved(tmp_path, SOUND)
    verdicts = accepted_by_llama_cpp(*map(fixture, HOSTILE), sound)
    let_through = {name for name, passed in zip(HOSTILE, verdicts, strict=False) if passed}
    assert let_through <= STRICTER
    assert verdicts[-1]
    assert list(read_gguf(sound).tensors) == ["first", "second"]


def test_every_truncation_of_a_sound_file_is_named_as_one(tmp_path: Path) -> None:
    for length in range(len(SOUND)):
        with pytest.raises(TruncatedFileError):
            read_gguf(saved(tmp_path, SOUND[:length]))


def test_counts_above_the_limits_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, generator.file(entry_count=70_000) + bytes(14 * 70_000))
    with pytest.raises(FormatError, match="70000 metadata entries; the limit is 65536"):
        read_gguf(path)
    path = saved(tmp_path, generator.file(tensor_count=300_000) + bytes(25 * 300_000))
    with pytest.raises(FormatError, match="300000 tensors; the limit is 262144"):
        read_gguf(path)


def test_the_other_sizes_of_an_empty_tensor_are_bounded_too(tmp_path: Path) -> None:
    path = saved(tmp_path, generator.file(rows=(generator.row(ne=(0, 1 << 60)),), data=0))
    assert read_gguf(path).tensors["first"].numpy().shape == (1 << 60, 0)
    path = saved(tmp_path, generator.file(rows=(generator.row(ne=(0, 1 << 62)),), data=0))
    with pytest.raises(FormatError, match="is larger than memory"):
        read_gguf(path)


def test_an_array_above_llama_cpps_limit_is_refused(tmp_path: Path) -> None:
    length = (1 << 30) + 1
    path = saved(tmp_path, generator.array(generator.UINT8, length))
    with path.open("r+b") as file:
        file.truncate(length + 4096)  # a hole: takes no disk
    with pytest.raises(FormatError, match=f"an.array: the array has {length} elements"):
        read_gguf(path)
    assert accepted_by_llama_cpp(path) == [False]


def test_paths_without_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(FormatError, match="is a directory"):
        read_gguf(tmp_path)


def test_broken_elements_are_found_when_they_are_decoded(tmp_path: Path) -> None:
    text = generator.array(generator.STRING, 2, generator.text(b"fine") + generator.text(b"\xff"))
    value = read_gguf(saved(tmp_path, text)).metadata["an.array"]
    assert isinstance(value, GGUFArray)
    with pytest.raises(FormatError, match="string 1 is not utf-8"):
        value.values()
    flags = generator.array(generator.BOOL, 3, b"\0\1\2")
    value = read_gguf(saved(tmp_path, flags)).metadata["an.array"]
    assert isinstance(value, GGUFArray)
    with pytest.raises(FormatError, match="boolean 2 is 2"):
        value.values()


def test_a_changed_file_is_an_error_not_another_value(tmp_path: Path) -> None:
    text = generator.array(generator.STRING, 2, generator.text(b"one") + generator.text(b"two"))
    path = saved(tmp_path, text)
    value = read_gguf(path).metadata["an.array"]
    assert isinstance(value, GGUFArray)
    path.write_bytes(text.replace(generator.text(b"one"), generator.text(b"on") + b"\0"))
    with pytest.raises(FormatError, match="string 1 ends outside the array"):
        value.values()
    path.write_bytes(text.replace(generator.text(b"two"), generator.text(b"tw") + b"\0"))
    with pytest.raises(FormatError, match="2 strings end at byte 21 of 22"):
        value.values()
    path.write_bytes(text[:50])
    with pytest.raises(TruncatedFileError):
        value.values()
