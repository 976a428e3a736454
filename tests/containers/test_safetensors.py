"""The safetensors container: what it reads, what it refuses, and what it writes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from adapterkit.containers.safetensors import read_safetensors, serialise, write_safetensors
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, NotFoundError, TruncatedFileError, UnsupportedError
from adapterkit.tensor import LazyTensor

ROOT = Path(__file__).parents[2]
HOSTILE = ROOT / "fixtures/hostile/safetensors"

# fixture -> error, the tensor or key it names, and a part of its message
DEFECTS = {
    "data-after-the-end": (FormatError, None, "4 bytes belong to no tensor"),
    "duplicate-key": (FormatError, "second", "the header has this key twice"),
    "duplicate-key-escaped": (FormatError, "second", "the header has this key twice"),
    "duplicate-metadata-key": (FormatError, "rank", "the header has this key twice"),
    "empty-file": (TruncatedFileError, None, "the file is empty"),
    "garbage": (FormatError, None, "is text ('This was a model once"),
    "git-lfs-pointer": (FormatError, None, "run `git lfs pull`"),
    "header-deeply-nested": (FormatError, None, "recursion limit"),
    "header-is-a-list": (FormatError, None, "not a JSON object"),
    "header-lies-about-offsets": (FormatError, "second", "starts at 12, not at 8: it leaves a gap"),
    "header-not-json": (FormatError, None, "key must be a string"),
    "header-not-utf8": (FormatError, None, "invalid UTF-8"),
    "header-of-101-mb": (FormatError, None, "101000000 bytes is claimed, the most is 100000000"),
    "header-past-eof": (TruncatedFileError, None, "ends within its header"),
    "huge-shape": (FormatError, "second", "needs 4398046511104 bytes, its offsets span 12"),
    "impossible-empty-axis": (FormatError, "third", "impossible size"),
    "metadata-not-text": (FormatError, None, "expected a string"),
    "missing-offsets": (FormatError, "second", "missing field `data_offsets`"),
    "negative-shape": (FormatError, "second", "integer `-1`"),
    "offsets-reversed": (FormatError, "second", "its offsets span -12"),
    "overlapping": (FormatError, "second", "it overlaps the tensor before it"),
    "shape-overflows": (FormatError, "second", "needs 295147905179352825856 bytes"),
    "too-many-axes": (FormatError, "second", "has 41 axes; at most 32"),
    "truncated-data": (TruncatedFileError, None, "1 of 20 bytes of data are missing"),
    "truncated-prefix": (TruncatedFileError, None, "the file has 5 bytes"),
    "type-not-in-the-model": (FormatError, "second", "dtype C64 cannot be read"),
    "unknown-type": (FormatError, "second", "dtype F31 cannot be read"),
    "wrong-size-for-shape": (FormatError, "second", "needs 8 bytes, its offsets span 12"),
}
PLAIN = [dtype for dtype in DType if not dtype.quantised]


def header_file(path: Path, header: str, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path


@pytest.mark.parametrize("name", DEFECTS)
def test_a_hostile_file_is_refused_by_name(name: str) -> None:
    error, where, fragment = DEFECTS[name]
    path = HOSTILE / f"{name}.safetensors"
    begin = time.process_time()
    with pytest.raises(FormatError) as caught:
        read_safetensors(path)
    assert time.process_time() - begin < 1
    assert type(caught.value) is error
    assert (caught.value.path, caught.value.where) == (path, where)
    assert fragment in caught.value.message


def test_every_hostile_file_is_in_the_table() -> None:
    assert {path.stem for path in HOSTILE.iterdir()} == DEFECTS.keys()


def test_the_generated_fixtures_are_the_committed_ones() -> None:
    command = [sys.executable, str(ROOT / "fixtures/generate.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_check_sees_a_changed_a_missing_and_a_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "generators").mkdir()
    source = "def files():\n    return {f'made/{name}': name.encode() for name in 'abc'}\n"
    (tmp_path / "generators/one.py").write_text(source)
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import generate;"
        "sys.exit(generate.main(sys.argv[3:], Path(sys.argv[2])))"
    )

    def run(*arguments: str) -> tuple[int, list[str]]:
        command = [sys.executable, "-c", program, str(ROOT / "fixtures"), str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.stderr
        return done.returncode, done.stdout.splitlines()

    assert run() == (0, [])
    assert run("--check") == (0, [])
    (tmp_path / "made/a").write_bytes(b"A")
    (tmp_path / "made/b").unlink()
    (tmp_path / "made/d").write_bytes(b"d")
    found = ["differs: made/a", "missing: made/b", "not generated: made/d"]
    assert run("--check") == (1, found)
    assert (tmp_path / "made/a").read_bytes() == b"A"


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.arange(4, dtype=torch.float32),
        "é": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.zeros(0, 7, dtype=torch.int64),
    }
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    file = read_safetensors(path)
    assert dict(file.metadata) == {"format": "pt"}
    assert list(file.tensors) == ["none", "é", "a", "b"]
    shapes = {name: (str(tensor.dtype), tensor.shape) for name, tensor in file.tensors.items()}
    assert shapes == {
        "none": ("I64", (0, 7)),
        "é": ("F64", ()),
        "a": ("F32", (4,)),
        "b": ("BF16", (2, 3)),
    }
    assert file.tensors["b"].numpy().astype(float).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.tensors["é"].numpy() == 1.5


def test_metadata_may_be_null_or_absent(tmp_path: Path) -> None:
    for header in ('{"__metadata__":null}', "{}"):
        file = read_safetensors(header_file(tmp_path / "x.safetensors", header))
        assert (dict(file.tensors), dict(file.metadata)) == ({}, {})


def test_empty_tensors_keep_the_order_of_the_header(tmp_path: Path) -> None:
    names = [f"{place:02}" for place in (7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 4, 6)]
    one = '"{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    header = "{" + ",".join(one.format(name) for name in names) + "}"
    path = header_file(tmp_path / "x.safetensors", header)
    assert list(read_safetensors(path).tensors) == names


def test_the_result_cannot_be_changed(tmp_path: Path) -> None:
    file = read_safetensors(header_file(tmp_path / "x.safetensors", "{}"))
    with pytest.raises(TypeError):
        file.tensors["x"] = None
    with pytest.raises(TypeError):
        file.metadata["x"] = "y"


def test_what_is_not_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_safetensors(tmp_path / "nowhere.safetensors")
    with pytest.raises(FormatError, match="is a directory"):
        read_safetensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    # To open it would be to wait for ever.
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("was opened"))
    with pytest.raises(FormatError, match="not a regular file"):
        read_safetensors(tmp_path / "pipe")


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = header_file(tmp_path / "x.safetensors", "{}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FormatError, match=r"could not be read \(Permission denied\)"):
        read_safetensors(path)


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": LazyTensor.of(np.zeros(100, np.float32))}, {})
    tensor = read_safetensors(path).tensors["a"]
    os.truncate(path, 100)
    with pytest.raises(TruncatedFileError):
        tensor.numpy()


@pytest.mark.parametrize("dtype", PLAIN)
def test_each_plain_type_is_written_as_the_library_writes_it(dtype: DType, tmp_path: Path) -> None:
    raw = np.arange(64, dtype=np.uint8)
    array = (raw % 2 if dtype is DType.BOOL else raw).view(dtype.numpy())
    write_safetensors(tmp_path / "ours", {"x": LazyTensor.of(array)}, {"format": "pt"})
    safetensors.numpy.save_file({"x": array}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert read_safetensors(tmp_path / "theirs").tensors["x"].dtype is dtype


def test_types_are_written_in_the_order_of_the_library(tmp_path: Path) -> None:
    arrays = {
        f"{dtype}.{copy}": np.zeros((2, 1), dtype.numpy()) for dtype in PLAIN for copy in "ba"
    }
    tensors = {name: LazyTensor.of(array) for name, array in arrays.items()}
    write_safetensors(tmp_path / "ours", tensors, {})
    safetensors.numpy.save_file(arrays, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_metadata_is_sorted_and_escaped_as_json(tmp_path: Path) -> None:
    awkward = '\x00\x1f\b\f\n\r\t"\\/\x7f\u2028é😀'
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {}, {"b": "2", "a": awkward})
    assert path.read_bytes()[8:].startswith(b'{"__metadata__":{"a":"\\u0000\\u001f\\b')
    assert dict(read_safetensors(path).metadata) == {"a": awkward, "b": "2"}
    write_safetensors(path, {}, {awkward: awkward})
    assert path.read_bytes() == safetensors.numpy.save({}, {awkward: awkward})


def test_arrays_in_any_memory_order_keep_their_values(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {
        "transposed": base.T,
        "reversed": base[::-1, ::-1],
        "strided": base[:, ::2],
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "big_endian": base.astype(">f4"),
        "bfloat16": base.astype(ml_dtypes.bfloat16).T,
    }
    tensors = {
        name: LazyTensor.of(view, DType.F32 if name == "big_endian" else None)
        for name, view in views.items()
    }
    write_safetensors(tmp_path / "ours", tensors, {})
    dense = {
        name: np.ascontiguousarray(view, dtype=view.dtype.newbyteorder("="))
        for name, view in views.items()
    }
    safetensors.numpy.save_file(dense, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    ("name", "dtype", "fragment"),
    [
        ("x", DType.Q8_0, "safetensors has no Q8_0 tensors"),
        ("__metadata__", DType.F32, "reserved"),
        ("x\udc80", DType.F32, "not valid Unicode"),
    ],
)
def test_what_the_container_cannot_hold_is_refused_before_writing(
    name: str, dtype: DType, fragment: str, tmp_path: Path
) -> None:
    tensor = LazyTensor(dtype, (32,), lambda: pytest.fail("was read"))
    with pytest.raises(UnsupportedError, match=fragment):
        write_safetensors(tmp_path / "x.safetensors", {name: tensor}, {})
    assert not list(tmp_path.iterdir())


def test_metadata_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="metadata is not valid Unicode"):
        write_safetensors(tmp_path / "x.safetensors", {}, {"a": "\ud800"})


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    size = 4 << 20
    tensor = LazyTensor(DType.U8, (size,), lambda: bytearray(size))
    tracemalloc.start()
    try:
        write_safetensors(tmp_path / "x", {str(place): tensor for place in range(8)}, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size <= peak < 1.5 * size


def test_a_tensor_is_read_only_when_its_turn_comes() -> None:
    read: list[str] = []
    tensors = {
        name: LazyTensor(DType.U8, (1,), lambda name=name: read.append(name) or b"x")
        for name in "cab"
    }
    pieces = serialise(tensors, {})
    next(pieces)
    assert read == []
    next(pieces)
    assert read == ["a"]
    assert list(pieces) == [b"x", b"x"]
    assert read == ["a", "b", "c"]


def test_a_header_is_read_without_data_or_torch(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": LazyTensor.of(np.zeros(4, np.float32))}, {})
    program = (
        "import sys; from pathlib import Path\n"
        "from adapterkit.containers.safetensors import read_safetensors\n"
        "assert not {'numpy', 'safetensors', 'torch'} & sys.modules.keys()\n"
        "assert list(read_safetensors(Path(sys.argv[1])).tensors) == ['a']\n"
        "assert not {'ml_dtypes', 'torch'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
