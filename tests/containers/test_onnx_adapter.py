"""FlatBuffers of named tensors: what onnxruntime reads and writes, and nothing that lies."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from adapterkit.containers import onnx_adapter
from adapterkit.containers.onnx_adapter import read_onnx_adapter, write_onnx_adapter
from adapterkit.errors import FormatError, TruncatedFileError, UnsupportedError
from adapterkit.tensor import LazyTensor
from fixtures.generators.onnx import flatbuffer, floats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Array = np.ndarray[Any, Any]
DTYPES = ["f4", "f2", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]
NAMES = st.text(min_size=1, max_size=20).filter(lambda name: "\0" not in name)


def written(path: Path, values: Mapping[str, Array], **versions: int) -> Path:
    write_onnx_adapter(path, {k: LazyTensor.of(v) for k, v in values.items()}, **versions)
    return path


drawn = st.dictionaries(
    NAMES.filter(lambda name: name.isprintable()),
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays.arrays(
            dtype,
            arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
        )
    ),
    max_size=6,
)


@given(drawn, st.integers(-(1 << 31), (1 << 31) - 1), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_onnxruntime_and_we_read_what_either_writes(
    values: dict[str, Array], adapter: int, model: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours = written(Path(folder, "o"), values, adapter_version=adapter, model_version=model)
        theirs = onnx_oracle.export(Path(folder, "t"), values, adapter, model)
        read = onnx_oracle.parameters(ours)
        assert read.keys() == values.keys()
        for path in (ours, theirs):
            file = read_onnx_adapter(path)
            assert (file.adapter_version, file.model_version) == (adapter, model)
            assert file.tensors.keys() == values.keys()
            for name, value in values.items():
                for found in (file.tensors[name].numpy(), read[name]):
                    assert found.dtype == value.dtype
                    assert found.shape == value.shape
                    assert found.tobytes() == value.tobytes()


def test_bfloat16_is_held_bit_for_bit(tmp_path: Path) -> None:
    value = np.linspace(-3, 3, 6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    path = written(tmp_path / "a", {"x": value})
    assert read_onnx_adapter(path).tensors["x"].tobytes() == value.tobytes()
    assert path.read_bytes()[-value.nbytes :] == value.tobytes()


def test_data_stands_where_a_processor_reads_it_at_once(tmp_path: Path) -> None:
    values = {"a" * n: np.ones((n, 3), "f2") for n in range(1, 9)}
    file = read_onnx_adapter(written(tmp_path / "a", values))
    assert all(tensor.read.offset % 8 == 0 for tensor in file.tensors.values())


SOUND = flatbuffer({"one": floats("one", 2, 3), "two": floats("two", 3, 2)})
ROOT = struct.unpack_from("<I", SOUND, 0)[0]
VECTOR = ROOT + 16 + struct.unpack_from("<I", SOUND, ROOT + 16)[0]
FIRST, SECOND = (VECTOR + at + struct.unpack_from("<I", SOUND, VECTOR + at)[0] for at in (4, 8))


def at(place: int, number: int, code: str = "<I") -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(code, data, place, number)


def target(table: int, field: int) -> int:
    place = table + 4 + 4 * field
    return place + struct.unpack_from("<I", SOUND, place)[0]


def renamed(data: bytearray) -> None:
    begin = target(SECOND, 0) + 4
    data[begin : begin + 3] = b"one"


DEFECTS: dict[str, tuple[Callable[[bytearray], None], type[FormatError], str]] = {
    "root outside": (at(0, 1 << 20), TruncatedFileError, "points at byte 104858"),
    "root crooked": (at(0, ROOT + 1), FormatError, "where nothing can be"),
    "root nowhere": (at(0, 0), FormatError, "the offset at byte 0 is 0"),
    "offset negative": (at(0, 1 << 31), FormatError, "the offset at byte 0 is 2147483648"),
    "another identifier": (at(4, 0), FormatError, "has no TORT at byte 4"),
    "field list outside": (at(ROOT, -(1 << 20), "<i"), TruncatedFileError, "points at byte"),
    "field list before": (at(ROOT, 1 << 20, "<i"), FormatError, "where nothing can be"),
    "field list odd": (at(ROOT - 12, 11, "<H"), FormatError, "impossible size of 11"),
    "another version": (at(ROOT + 4, 2), FormatError, "is of version 2"),
    "no list": (at(ROOT - 2, 0, "<H"), FormatError, "has no list of parameters"),
    "too many": (at(VECTOR, 1 << 30), TruncatedFileError, "points at byte"),
    "no name": (at(FIRST - 8, 0, "<H"), FormatError, "without a name"),
    "no shape": (at(FIRST - 6, 0, "<H"), FormatError, "has no shape or no data"),
    "no data": (at(FIRST - 2, 0, "<H"), FormatError, "has no shape or no data"),
    "empty name": (at(target(FIRST, 0), 0), FormatError, "a name of 0 letters"),
    "name without an end": (at(target(FIRST, 0), 2), FormatError, "does not end in a zero byte"),
    "no text": (at(target(FIRST, 0) + 4, 0xFF, "<B"), FormatError, "is no UTF-8 text"),
    "a name twice": (renamed, FormatError, "is there twice"),
    "many axes": (at(target(FIRST, 1), 40), TruncatedFileError, "points at byte"),
    "no axes": (at(target(FIRST, 1), 0), FormatError, "has 0 axes"),
    "negative axis": (at(target(FIRST, 1) + 4, -1, "<q"), FormatError, "impossible size"),
    "other shape": (at(target(FIRST, 1) + 4, 5, "<q"), FormatError, "needs 60 bytes, it has 24"),
    "another type": (at(FIRST + 12, 8), FormatError, "data type 8, which cannot be read"),
    "data too long": (at(target(SECOND, 3), 1 << 20), TruncatedFileError, "points at byte"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_named(defect: str, tmp_path: Path) -> None:
    change, kind, message = DEFECTS[defect]
    data = bytearray(SOUND)
    change(data)
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises((kind, UnsupportedError), match=message):
        read_onnx_adapter(path)


def test_the_sound_file_is_read_by_both(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(SOUND)
    theirs = onnx_oracle.parameters(tmp_path / "a")
    ours = read_onnx_adapter(tmp_path / "a").tensors
    assert {k: v.numpy().tolist() for k, v in ours.items()} == {
        k: v.tolist() for k, v in theirs.items()
    }


@pytest.mark.parametrize("length", range(0, len(SOUND), 7))
def test_a_file_that_was_cut_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(SOUND[:length])
    with pytest.raises(FormatError):
        read_onnx_adapter(tmp_path / "a")


def test_few_bytes_are_not_many(tmp_path: Path) -> None:
    """Two parameters whose data is the same bytes."""
    first = {"a": floats("a", 2, 3), "b": floats("b", 2, 3)}
    data = bytearray(flatbuffer(first))
    begin = data.rindex(first["b"][1]) - 4
    at_a = data.index(first["a"][1]) - 4
    places = [n for n in range(8, len(data) - 3, 4) if n + _u32(data, n) == at_a]
    (place,) = places
    struct.pack_into("<I", data, place, begin - place)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(FormatError, match="overlaps another parameter's"):
        read_onnx_adapter(tmp_path / "a")


def _u32(data: bytearray, place: int) -> int:
    return struct.unpack_from("<I", data, place)[0]


def test_more_than_two_gibibytes_are_refused_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_adapter, "MAX_BYTES", 1000)
    with pytest.raises(UnsupportedError, match="onnxruntime takes at most 1000"):
        written(tmp_path / "a", {"x": np.ones((16, 16), "f4")})
    assert not (tmp_path / "a").exists()


def test_what_onnxruntime_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="takes no F8_E8M0"):
        written(tmp_path / "a", {"x": np.ones(4, ml_dtypes.float8_e8m0fnu)})
    with pytest.raises(UnsupportedError, match="has no axes"):
        written(tmp_path / "a", {"x": np.float32(1).reshape(())})
