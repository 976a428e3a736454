"""Files of torch.save, read without torch: what is read, what is refused, and that nothing runs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch_files import HOSTILE, ROOT, bits, saved

from adapterkit.containers.torch_zip import flatten, read_torch_zip
from adapterkit.dtype import DType
from adapterkit.errors import (
    FormatError,
    TruncatedFileError,
)
from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor
from fixtures.generators import torch_zip as build


def test_a_state_dict_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    file = read_torch_zip(saved(state, tmp_path / "adapter_model.bin"))
    assert type(file.root) is dict
    assert list(file.tensors) == list(state)
    for name, tensor in file.tensors.items():
        assert tensor.shape == tuple(state[name].shape)
        assert bytes(tensor.tobytes()) == bits(state[name])


def test_data_is_a_range_of_the_file(tmp_path: Path) -> None:
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    path = saved({"w": weight, "row": weight[1], "one": weight[::2][:1]}, tmp_path / "x.pt")
    tensors = read_torch_zip(path).tensors
    assert isinstance(tensors["w"].read, FileSlice)
    assert tensors["row"].read == FileSlice(path, tensors["w"].read.offset + 16, 16)
    assert tensors["one"].read == FileSlice(path, tensors["w"].read.offset, 16)
    os.truncate(path, 100)
    with pytest.raises(TruncatedFileError):
        tensors["w"].numpy()


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_plain_values_come_back_as_they_were(protocol: int, tmp_path: Path) -> None:
    shared = [1, 2]
    plain = {
        "text": "é😀",
        "numbers": [0, -1, 255, 65536, -(2**31), 2**40, 10**30, 1.5, float("inf")],
        "flags": (True, False, None),
        "empty": [{}, [], (), set(), frozenset(), b"", ""],
        "sets": [{"q_proj", "v_proj"}, frozenset([1, "a"])],
        "bytes": b"\x00\xff",
        7: {("a", 1): "tuple key", None: 1, 2.5: 2, True: 3},
        "shared": [shared, shared],
        "many": list(range(2000)),
        "ordered": OrderedDict(b=1, a=2),
    }
    file = read_torch_zip(saved(plain, tmp_path / "x.pt", pickle_protocol=protocol))
    assert file.root == plain
    assert type(file.root["ordered"]) is dict
    assert list(file.root["ordered"]) == ["b", "a"]
    assert not file.tensors


def test_torch_s_own_values_become_plain(tmp_path: Path) -> None:
    weight = torch.ones(2)
    weight.note = "an attribute"
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.note = "another"
    values = {
        "dtype": torch.bfloat16,
        "device": [torch.device("cpu"), torch.device("cuda", 1)],
        "size": torch.Size([2, 3]),
        "array": bytearray(b"x"),
        "weight": weight,
        "parameter": parameter,
        "plain": torch.nn.Parameter(torch.ones(4), requires_grad=False),
    }
    root = read_torch_zip(saved(values, tmp_path / "x.pt")).root
    assert [root.pop(name) for name in ("dtype", "device", "size", "array")] == [
        "torch.bfloat16",
        ["cpu", "cuda:1"],
        (2, 3),
        b"x",
    ]
    assert {name: tensor.numpy().tolist() for name, tensor in root.items()} == {
        "weight": [1.0] * 2,
        "parameter": [1.0] * 3,
        "plain": [1.0] * 4,
    }


def test_only_flatten_looks_into_nested_containers(tmp_path: Path) -> None:
    def one(value: float) -> torch.Tensor:
        return torch.tensor([value])

    checkpoint = {
        "top": one(1),
        "model": {"a": {"weight": one(2)}, "b": one(3)},
        "layers": [{"w": one(4)}, (one(5), 6)],
        "step": 7,
        0: {"w": one(8)},
    }
    file = read_torch_zip(saved(checkpoint, tmp_path / "x.pt"))
    assert list(file.tensors) == ["top"]
    values = {name: tensor.numpy().item() for name, tensor in flatten(file.root).items()}
    assert values == {
        "top": 1,
        "model.a.weight": 2,
        "model.b": 3,
        "layers.0.w": 4,
        "layers.1.0": 5,
        "0.w": 8,
    }
    assert [*flatten(file.root["model"])] == ["a.weight", "b"]


def test_a_root_that_is_no_dict(tmp_path: Path) -> None:
    file = read_torch_zip(saved(torch.ones(2), tmp_path / "x.pt"))
    assert isinstance(file.root, LazyTensor)
    assert not file.tensors
    assert list(flatten(file.root)) == [""]


def test_flatten_refuses_paths_that_meet_or_grow_without_end() -> None:
    tensor = LazyTensor(DType.U8, (0,), lambda: b"")
    with pytest.raises(FormatError, match=r"a\.b: two tensors have this path"):
        flatten({"a.b": tensor, "a": {"b": tensor}})
    with pytest.raises(FormatError, match="more than 1000 letters"):
        flatten({"x" * 600: {"y" * 600: tensor}})


VIEWS = {
    "transposed": lambda base: base.t(),
    "column": lambda base: base[:, 1],
    "steps": lambda base: base[::2, ::3],
    "permuted": lambda base: base.reshape(2, 2, 6).permute(2, 0, 1),
    "one": lambda base: base[2, 3],
    "row": lambda base: base[1:2].t(),
    "empty": lambda base: base[:, 2:2],
    "window": lambda base: base.reshape(-1)[:8].unfold(0, 4, 2),
    "expanded_but_small": lambda base: base[:1].expand(3, 6),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_put_in_order(view: str, tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.int16).reshape(4, 6)
    expected = VIEWS[view](base)
    path = saved({"base": base, "view": expected}, tmp_path / "x.pt")
    tensor = read_torch_zip(path).tensors["view"]
    assert tensor.shape == tuple(expected.shape)
    assert bytes(tensor.tobytes()) == bits(expected)
    assert tensor.numpy().tolist() == expected.tolist()
    with zipfile.ZipFile(path) as archive:
        storages = [name for name in archive.namelist() if "/data/" in name]
    assert storages == ["x/data/0"]


def test_an_expanded_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    path = saved({"lora": {"A": torch.ones(1).expand(5)}}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"lora\.A: repeats elements: 20 bytes of a storage of 4"):
        read_torch_zip(path)


def test_the_format_before_1_6_is_refused(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(2)}, tmp_path / "x", _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"before 1\.6"):
        read_torch_zip(path)


def test_a_compressed_copy_is_refused(tmp_path: Path) -> None:
    source = saved({"a": torch.zeros(4096)}, tmp_path / "x.pt")
    copy = tmp_path / "copy.pt"
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(FormatError, match="is compressed"):
        read_torch_zip(copy)


def test_nothing_of_torch_is_imported(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(2, 3).t()}, tmp_path / "x.pt")
    program = (
        "import sys; from pathlib import Path\n"
        "from adapterkit.containers.torch_zip import read_torch_zip\n"
        "file = read_torch_zip(Path(sys.argv[1]))\n"
        "assert file.tensors['a'].shape == (3, 2)\n"
        "assert not {'numpy', 'ml_dtypes', 'torch'} & sys.modules.keys()\n"
        "assert file.tensors['a'].numpy().tolist() == [[1, 1]] * 3\n"
        "assert not {'torch'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_buffer_saved_by_torch_needs_no_name(tmp_path: Path) -> None:
    # Saved to a buffer, the folder in the zip is `archive`; saved to a file, the file's stem.
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    (tmp_path / "renamed.bin").write_bytes(buffer.getvalue())
    assert read_torch_zip(tmp_path / "renamed.bin").tensors["a"].shape == (2,)


def test_a_boolean_that_is_neither_is_not_decoded(tmp_path: Path) -> None:
    """torch takes 2 for true; other programs read it as 2, or as its last bit."""
    whole = build.tensor((2,), (1,), source=build.storage(count=2, kind="BoolStorage"))
    pickled = build.PROTO_2 + build.mapping(("weight", whole)) + build.STOP
    (tmp_path / "x.pt").write_bytes(build.archive(pickled, data=b"\1\2"))
    assert torch.load(tmp_path / "x.pt", weights_only=True)["weight"].tolist() == [True, True]
    weight = read_torch_zip(tmp_path / "x.pt").tensors["weight"]
    with pytest.raises(FormatError, match=r"x\.pt: holds a boolean that is 2, neither 0 nor 1"):
        weight.numpy()


@pytest.mark.parametrize("name", ["no-version", "version-11", "version-of-letters"])
def test_torch_refuses_these_versions_too(name: str) -> None:
    with pytest.raises(RuntimeError, match="version"):
        torch.load(HOSTILE / f"{name}.pt", weights_only=True)
