"""Laws of the GGUF container: writing undoes reading, and no bytes get past the error tree."""

from __future__ import annotations

import struct
import tempfile
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.containers.gguf import (
    GGUFArray,
    GGUFFile,
    GGUFValue,
    Typed,
    ValueType,
    array,
    read_gguf,
    write_gguf,
)
from adapterkit.containers.gguf_values import GGML_TYPES
from adapterkit.errors import AdapterKitError
from adapterkit.tensor import LazyTensor
from fixtures.generators import gguf as generator

pytestmark = pytest.mark.slow

KILOBYTE = 1 << 10
SCALARS = {
    **{
        kind: st.integers(low, high)
        for kind, low, high in [
            (ValueType.UINT8, 0, 2**8 - 1),
            (ValueType.INT8, -(2**7), 2**7 - 1),
            (ValueType.UINT16, 0, 2**16 - 1),
            (ValueType.INT16, -(2**15), 2**15 - 1),
            (ValueType.UINT32, 0, 2**32 - 1),
            (ValueType.INT32, -(2**31), 2**31 - 1),
            (ValueType.UINT64, 0, 2**64 - 1),
            (ValueType.INT64, -(2**63), 2**63 - 1),
        ]
    },
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.FLOAT64: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.STRING: st.text(max_size=20),
}
KEYS = st.text(min_size=1, max_size=20).filter(lambda key: key != "general.alignment")
NAMES = st.text(min_size=1, max_size=15).filter(lambda name: "\0" not in name)


@st.composite
def values(draw: st.DrawFn) -> GGUFValue:
    kind = draw(st.sampled_from(list(SCALARS)))
    if draw(st.booleans()):
        return array(kind, draw(st.lists(SCALARS[kind], max_size=6)))
    return Typed(kind, draw(SCALARS[kind]))


@st.composite
def tensors(draw: st.DrawFn) -> LazyTensor:
    dtype = draw(st.sampled_from(list(GGML_TYPES.values())))
    outer = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (*outer, dtype.block * draw(st.integers(1, 3)))
    # The bits are what counts, not the values: NaN payloads must survive, too.
    seed = draw(st.binary(min_size=1, max_size=16))
    size = dtype.nbytes(shape)
    data = (seed * size)[:size]
    return LazyTensor(dtype, shape, lambda: data)


def plain(value: Any) -> Any:
    match value:
        case GGUFArray(kind):
            return kind, value.values()
        case Typed(kind, content):
            return kind, content
        case _:
            return value


@settings(max_examples=60, deadline=None)
@given(
    metadata=st.dictionaries(KEYS, values(), max_size=5),
    weights=st.dictionaries(NAMES, tensors(), max_size=4),
    alignment=st.sampled_from([None, 1, 8, 64, 4096]),
)
def test_reading_undoes_writing(
    metadata: dict[str, GGUFValue], weights: dict[str, LazyTensor], alignment: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first.gguf", Path(folder) / "second.gguf"
        write_gguf(first, metadata, weights, alignment=alignment)
        file = read_gguf(first)
        written = {key: plain(value) for key, value in file.typed().items()}
        if alignment not in {None, 32}:
            assert written.pop("general.alignment") == (ValueType.UINT32, alignment)
        assert written == {key: plain(value) for key, value in metadata.items()}
        assert list(written) == list(metadata)
        assert list(file.tensors.items()) == list(weights.items())
        assert [t.tobytes() for t in file.tensors.values()] == [
            t.tobytes() for t in weights.values()
        ]
        write_gguf(second, file.typed(), file.tensors)
        assert second.read_bytes() == first.read_bytes()


def sound() -> bytes:
    extras = (
        generator.entry(b"flag", generator.BOOL, b"\1"),
        generator.entry(b"count", generator.UINT32, bytes(4)),
        generator.entry(
            b"list",
            generator.ARRAY,
            struct.pack("<IQ", generator.STRING, 2) + generator.text(b"a") + generator.text(b"bc"),
        ),
        generator.entry(b"bytes", generator.ARRAY, struct.pack("<IQ", 0, 3) + b"xyz"),
    )
    rows = (
        generator.row(b"first", (4, 2)),
        generator.row(b"second", (32,), kind=generator.Q8_0, offset=32),
    )
    return generator.file(entries=extras, rows=rows, data=32 + 34)


SOUND = sound()
NUMBERS = st.sampled_from([0, 1, 13, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draw a sound file with a few numbers or bytes replaced, cut, repeated or removed."""
    data = bytearray(SOUND)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["number", "byte", "cut", "insert", "remove"])):
            case "number":
                wide = draw(st.booleans())
                number = draw(NUMBERS)
                data[at : at + (8 if wide else 4)] = (
                    struct.pack("<Q", number) if wide else struct.pack("<I", number & 0xFFFFFFFF)
                )
            case "byte":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=40))
            case _:
                del data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


def examined(path: Path) -> GGUFFile:
    """Read everything that a file offers."""
    file = read_gguf(path)
    for value in file.metadata.values():
        if isinstance(value, GGUFArray):
            assert len(value.values()) == len(value)
    for tensor in file.tensors.values():
        assert len(tensor.tobytes()) == tensor.nbytes
        assert tensor.numpy().shape == tensor.shape
    return file


def survives(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(data)
        tracemalloc.start()
        try:
            with suppress(AdapterKitError):
                read_gguf(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 5 * len(data) + 256 * KILOBYTE
        with suppress(AdapterKitError):
            examined(path)


def test_the_file_that_gets_damaged_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(SOUND)
    file = examined(path)
    assert len(file.metadata) == 5
    assert len(file.tensors) == 2


@settings(max_examples=100, deadline=None)
@given(data=damaged())
def test_a_damaged_file_is_an_error_of_ours(data: bytes) -> None:
    survives(data)


@settings(max_examples=60, deadline=None)
@given(head=st.sampled_from([b"", b"GGUF", SOUND[:8], SOUND[:24]]), tail=st.binary(max_size=300))
def test_random_bytes_are_an_error_of_ours(head: bytes, tail: bytes) -> None:
    survives(head + tail)
