"""Whatever the bytes: ours are the library's, and we accept nothing that the library rejects."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.containers.safetensors import (
    SafetensorsFile,
    read_safetensors,
    serialise,
    write_safetensors,
)
from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.tensor import LazyTensor

pytestmark = pytest.mark.slow

TORCH = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E5M2: torch.float8_e5m2,
    DType.F8_E8M0: torch.float8_e8m0fnu,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I16: torch.int16,
    DType.I8: torch.int8,
    DType.U64: torch.uint64,
    DType.U32: torch.uint32,
    DType.U16: torch.uint16,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
}
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
# What we refuse and the library takes, by a part of the message.
STRICTER = ("this key twice", "cannot be read; known are", "axes; at most", "impossible size")
STRICTER += ("larger than memory",)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """An array of any plain type and any bits, in any memory order."""
    dtype = draw(st.sampled_from(list(TORCH)))
    shape = draw(SHAPES)
    size = dtype.nbytes(shape)
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = (raw % 2 if dtype is DType.BOOL else raw).view(dtype.numpy()).reshape(shape)
    return array.transpose(draw(st.permutations(range(array.ndim))))


FILES = st.dictionaries(NAMES, arrays(), max_size=6)
# The library keeps metadata in a hash map: with more keys than one its order is random.
METADATA = st.one_of(st.just({}), st.tuples(NAMES, NAMES).map(lambda pair: dict([pair])))


def written(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    lazy = {name: LazyTensor.of(array) for name, array in tensors.items()}
    return b"".join(bytes(piece) for piece in serialise(lazy, metadata))


def as_torch(array: np.ndarray) -> torch.Tensor:
    data = bytearray(np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes())
    dtype = TORCH[DType.of(array.dtype)]
    if not data:
        return torch.empty(array.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(array.shape)


@settings(max_examples=100, deadline=None)
@given(tensors=FILES, metadata=METADATA)
def test_our_bytes_are_the_library_s(
    tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    # Its numpy front end writes wrong values for arrays that are not contiguous.
    dense = {
        name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()
    }
    ours = written(tensors, metadata)
    assert ours == safetensors.numpy.save(dense, metadata or None)
    assert ours == safetensors.torch.save(
        {name: as_torch(array) for name, array in dense.items()}, metadata or None
    )


@settings(max_examples=100, deadline=None)
@given(tensors=FILES, metadata=st.dictionaries(NAMES, NAMES, max_size=3))
def test_reading_undoes_writing(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        lazy = {name: LazyTensor.of(array) for name, array in tensors.items()}
        write_safetensors(path, lazy, metadata)
        file = read_safetensors(path)
        assert dict(file.tensors) == lazy
        assert dict(file.metadata) == metadata
        for name, tensor in file.tensors.items():
            assert bytes(tensor.tobytes()) == bytes(lazy[name].tobytes())


NUMBERS = st.one_of(st.integers(0, 8), st.sampled_from([-1, 1.0, 2**63, 2**64, 10**30, True, None]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "U8", "F4", "C64", "X", 3]),
        "shape": st.lists(NUMBERS, max_size=3) | st.just([1] * 33),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    },
    optional={"more": st.just(1)},
)


@st.composite
def nearly_valid(draw: st.DrawFn) -> bytes:
    """A header of sound entries in a row, of which some parts may be wrong."""
    pairs: list[tuple[str, object]] = []
    end = 0
    for name in draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=4)):
        count = draw(st.integers(0, 3))
        shift = draw(st.sampled_from([0] * 9 + [1]))
        sound = {"dtype": "U8", "shape": [count], "data_offsets": [end + shift, end + count]}
        end += count
        pairs.append((name, draw(st.sampled_from([sound] * 7 + [draw(ENTRIES)]))))
    metadata = draw(st.sampled_from([None, {}, {"a": "b"}, {"a": 1}, [], "absent", "absent"]))
    if metadata != "absent":
        pairs.append(("__metadata__", metadata))
    text = ",".join(f"{json.dumps(name)}:{json.dumps(info)}" for name, info in pairs)
    header = b"{" + text.encode() + b"}" + b" " * draw(st.integers(0, 3))
    length = len(header) + draw(st.sampled_from([0] * 9 + [-1, 1, 2**40]))
    return length.to_bytes(8, "little") + header + bytes(end + draw(st.sampled_from([0] * 5 + [1])))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A sound file with some bytes changed, cut or added."""
    data = bytearray(written(draw(FILES), draw(METADATA)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data) - 1)) if data else 0
        kind = draw(st.sampled_from(["change", "cut", "add", "end"]))
        if kind == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 8))]
        elif kind == "add":
            data[place:place] = draw(st.binary(max_size=8))
        else:
            del data[place:]
    return bytes(data)


def reference(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            views = {name: file.get_slice(name) for name in file.offset_keys()}
            return {
                name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()
            }
    except (safetensors.SafetensorError, OSError):
        return None


def attempt(path: Path) -> SafetensorsFile | FormatError:
    try:
        return read_safetensors(path)
    except FormatError as error:
        return error


def agrees_with_the_library(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        theirs = reference(path)
        file = attempt(path)
        if isinstance(file, FormatError):
            assert file.path == path
            assert theirs is None or any(part in file.message for part in STRICTER)
            return
        ours = {name: (str(tensor.dtype), tensor.shape) for name, tensor in file.tensors.items()}
        assert ours == theirs
        body = b"".join(bytes(tensor.tobytes()) for tensor in file.tensors.values())
        assert data.endswith(body)


@settings(max_examples=100, deadline=None)
@given(data=nearly_valid())
def test_a_nearly_valid_header_is_judged_as_the_library_does(data: bytes) -> None:
    agrees_with_the_library(data)


@settings(max_examples=100, deadline=None)
@given(data=mutated())
def test_a_damaged_file_is_judged_as_the_library_does(data: bytes) -> None:
    agrees_with_the_library(data)


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=64))
def test_random_bytes_are_judged_as_the_library_does(data: bytes) -> None:
    agrees_with_the_library(data)
