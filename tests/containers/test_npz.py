"""Zips of arrays: equal to numpy's own reading, refused where numpy would unpickle or expand."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from adapterkit.containers.npz import FREE_BYTES, read_npz
from adapterkit.containers.zip_members import MAX_MEMBERS
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, NotFoundError, TruncatedFileError
from fixtures.generators.handwritten import Member, npy, one, zipped

pytestmark = pytest.mark.slow

HOSTILE = Path(__file__).parents[2] / "fixtures/hostile/npz"
WEIGHT = "weight.npy"

# fixture -> error, the member it names, and a part of its message
DEFECTS = {
    "bomb": (FormatError, WEIGHT, "386 bytes expand to 140509353, more than 20 times"),
    "bzip2": (FormatError, WEIGHT, "compressed by method 12"),
    "checksum-wrong": (FormatError, WEIGHT, "its checksum is wrong"),
    "complex": (FormatError, WEIGHT, "type '<c8' cannot be read; save it again"),
    "deflate-broken": (FormatError, WEIGHT, "its compressed data is broken"),
    "duplicate-member": (FormatError, WEIGHT, "two members of one name"),
    "empty-file": (TruncatedFileError, None, "the file is empty"),
    "encrypted": (FormatError, WEIGHT, "is encrypted"),
    "expands-to-less": (FormatError, WEIGHT, "other than the 94 bytes that the zip states"),
    "expands-to-more": (FormatError, WEIGHT, "other than the 94 bytes that the zip states"),
    "header-calls": (FormatError, WEIGHT, "its header is malformed"),
    "header-deeply-nested": (FormatError, WEIGHT, "its header is malformed"),
    "header-endless": (FormatError, WEIGHT, "its header has 11017 bytes"),
    "header-is-a-list": (FormatError, WEIGHT, "its header is malformed"),
    "header-not-utf8": (FormatError, WEIGHT, "its header is malformed"),
    "header-past-the-end": (FormatError, WEIGHT, "its header is malformed"),
    "local-header-missing": (FormatError, WEIGHT, "has no local header"),
    "member-is-text": (FormatError, "notes.txt", "is no .npy array"),
    "member-past-the-end": (TruncatedFileError, WEIGHT, "its data ends at byte 5173"),
    "negative-shape": (FormatError, WEIGHT, "its header is malformed"),
    "no-directory": (TruncatedFileError, None, "directory at the end of the zip is missing"),
    "not-an-array": (FormatError, WEIGHT, "is no .npy array"),
    "object-array": (FormatError, WEIGHT, "holds Python objects (type |O)"),
    "order-missing": (FormatError, WEIGHT, "its header is malformed"),
    "overlapping": (FormatError, WEIGHT, "overlaps the member before it"),
    "records": (FormatError, WEIGHT, "holds records, not numbers"),
    "shape-huge": (FormatError, WEIGHT, "is larger than memory"),
    "shape-larger-than-data": (FormatError, WEIGHT, "F32 [2, 4] needs 102 bytes"),
    "shape-not-whole": (FormatError, WEIGHT, "its header is malformed"),
    "shape-of-truth": (FormatError, WEIGHT, "its header is malformed"),
    "shape-smaller-than-data": (FormatError, WEIGHT, "F32 [2, 2] needs 86 bytes"),
    "stored-with-two-sizes": (FormatError, WEIGHT, "is stored, and yet has two sizes"),
    "text-array": (FormatError, WEIGHT, "type '<U6' cannot be read"),
    "too-many-axes": (FormatError, WEIGHT, "has 41 axes"),
    "unknown-order": (FormatError, WEIGHT, "type '=f4' cannot be read"),
    "version-9": (FormatError, WEIGHT, "is no .npy array"),
    "local-header-of-another-checksum": (FormatError, WEIGHT, "contradicts the directory"),
    "local-header-of-another-method": (FormatError, WEIGHT, "contradicts the directory"),
    "local-header-of-another-name": (FormatError, WEIGHT, "contradicts the directory"),
    "local-header-of-another-size": (FormatError, WEIGHT, "contradicts the directory"),
    "name-endless": (FormatError, "w" * 80 + "...", "a name of more than 1000 letters"),
    "no-comma": (FormatError, WEIGHT, "its header is malformed"),
    "order-of-text": (FormatError, WEIGHT, "its order is neither True nor False"),
    "place-past-every-file": (FormatError, WEIGHT, "a place or size that no file has"),
    "shape-no-tuple": (FormatError, WEIGHT, "its shape is not of whole numbers"),
    "version-1-1": (FormatError, WEIGHT, "is no .npy array of version 1, 2 or 3"),
    "void": (FormatError, WEIGHT, "type '|V2' cannot be read"),
}
KINDS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")


def read_all(path: Path) -> None:
    for tensor in read_npz(path).values():
        assert len(tensor.tobytes()) == tensor.nbytes


def test_every_hostile_fixture_is_expected() -> None:
    assert {path.stem for path in HOSTILE.iterdir()} == set(DEFECTS)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_hostile_file_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind, where, message = DEFECTS[name]
    with pytest.raises(FormatError) as caught:
        read_all(HOSTILE / f"{name}.npz")
    assert type(caught.value) is kind
    assert caught.value.where == where
    assert message in caught.value.message
    assert not list(tmp_path.iterdir()), "something in the file was executed"


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_npz(tmp_path / "none.npz")


@st.composite
def saved(draw: st.DrawFn) -> dict[str, np.ndarray]:
    kinds = st.sampled_from(KINDS).flatmap(
        lambda kind: st.sampled_from("<>").map(lambda order: np.dtype(order + kind))
    )
    array = kinds.flatmap(
        lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, min_side=0, max_side=4))
    )
    turned = array.map(np.asfortranarray)
    names = st.text("abz._0", min_size=1, max_size=8)
    return draw(st.dictionaries(names, array | turned, min_size=1, max_size=4))


@given(saved(), st.booleans())
@settings(deadline=None)
def test_values_are_those_that_numpy_reads(data: dict[str, np.ndarray], packed: bool) -> None:
    buffer = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(buffer, **data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        path.write_bytes(buffer.getvalue())
        tensors = read_npz(path)
        assert list(tensors) == list(data)
        for name, array in data.items():
            assert tensors[name].shape == array.shape
            assert tensors[name].dtype is DType.of(array.dtype.newbyteorder("<"))
            wanted = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
            assert bytes(tensors[name].tobytes()) == wanted.tobytes()


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_a_damaged_file_is_an_error_of_its_own(data: st.DataObject) -> None:
    sound = bytearray(one(npy(), method=8))
    for _ in range(data.draw(st.integers(1, 3))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        path.write_bytes(sound[: data.draw(st.integers(1, len(sound)))])
        with suppress(FormatError):
            read_all(path)


def test_a_file_of_130_kilobytes_that_expands_to_134_megabytes_costs_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, zeros=np.zeros(134 << 17))
    assert path.stat().st_size < 140_000
    tracemalloc.start()
    with pytest.raises(FormatError, match="more than 20 times"):
        read_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_zeros_beside_trained_values_are_no_bomb(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=1 << 20)
    path = tmp_path / "half.npz"
    np.savez_compressed(path, a=noise, b=np.zeros(FREE_BYTES // 8))
    tensors = read_npz(path)
    assert tensors["a"].numpy().tolist() == noise.tolist()


def test_a_tensor_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "many.npz"
    np.savez(path, **{f"a{place}": np.full(1 << 17, place, dtype="f8") for place in range(20)})
    tensors = read_npz(path)
    tracemalloc.start()
    for place, tensor in enumerate(tensors.values()):
        assert tensor.numpy()[-1] == place
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()


def test_a_file_that_shrank_is_noticed_at_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "shrunk.npz"
    path.write_bytes(one(npy()))
    tensor = read_npz(path)["weight"]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TruncatedFileError):
        tensor.tobytes()


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.containers.zip_members.MAX_MEMBERS", 3)
    assert MAX_MEMBERS > 1000
    path = tmp_path / "many.npz"
    path.write_bytes(zipped(*(Member(f"a{place}.npy", npy()) for place in range(4))))
    with pytest.raises(FormatError, match="has 4 members"):
        read_npz(path)


def test_a_path_as_a_name_is_only_a_name(tmp_path: Path) -> None:
    path = tmp_path / "path.npz"
    path.write_bytes(zipped(Member("../../etc/passwd.npy", npy())))
    assert list(read_npz(path)) == ["../../etc/passwd"]


def test_another_writers_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    header = "{'shape': (2,3), 'fortran_order':True, 'descr':'>f4'}"
    raw = b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header.encode()
    values = np.arange(6, dtype=">f4")
    path.write_bytes(zipped(Member("a.npy", raw + values.tobytes())))
    assert read_npz(path)["a"].numpy().tolist() == values.reshape(2, 3, order="F").tolist()


@pytest.mark.parametrize("text", ["{'a':" * 2000, "(1 " * 3000, "{" + "'a' : (1 , ), " * 700])
def test_a_hostile_header_takes_no_time(text: str, tmp_path: Path) -> None:
    path = tmp_path / "slow.npz"
    raw = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    path.write_bytes(zipped(Member("a.npy", raw)))
    code = "import sys; from pathlib import Path; from adapterkit.containers.npz import *\n"
    code += "try: read_npz(Path(sys.argv[1]))\nexcept FormatError: sys.exit(7)"
    # A pattern that tries everything would never come back: the limit is the test.
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=20, check=False)
    assert done.returncode == 7


def test_headers_are_read_without_numpy(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros((2, 2)))
    code = "import sys; from pathlib import Path; from adapterkit.containers.npz import read_npz\n"
    code += (
        "assert read_npz(Path(sys.argv[1]))['a'].shape == (2, 2); assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_zipfile_agrees_on_what_the_generator_makes() -> None:
    with zipfile.ZipFile(io.BytesIO(one(npy(), method=8))) as archive:
        assert archive.testzip() is None
