"""Files of torch.save, read without torch: what is read, what is refused, and that nothing runs."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from adapterkit.containers.pickle_reader import MAX_OPCODES, MAX_PICKLE
from adapterkit.containers.torch_zip import flatten, read_torch_zip
from adapterkit.dtype import DType
from adapterkit.errors import (
    AdapterKitError,
    FormatError,
    NotFoundError,
    TruncatedFileError,
    UnsafePickleError,
)
from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor
from fixtures.generators import torch_zip as build

ROOT = Path(__file__).parents[2]
HOSTILE = ROOT / "fixtures/hostile/torch_zip"
WEIGHT, RECORD = "weight", "archive/data/0"

# fixture -> error, the tensor or member it names, and a part of its message
DEFECTS = {
    "after-stop": (FormatError, None, "4 bytes follow STOP"),
    "bare-pickle": (UnsafePickleError, None, "bare pickle, not a zip of torch.save"),
    "bare-storage": (FormatError, WEIGHT, "is a Storage, neither tensor nor plain data"),
    "big-endian": (FormatError, None, "byte order b'big'"),
    "billion-laughs": (FormatError, None, "unfolds to 123456790123 objects"),
    "callable-as-value": (FormatError, WEIGHT, "neither tensor nor plain data"),
    "complex": (FormatError, WEIGHT, "holds ComplexFloatStorage, which cannot be read"),
    "copies-of-one-list": (FormatError, None, "copy more than the pickle holds"),
    "copies-of-one-size": (FormatError, None, "copy more than the pickle holds"),
    "deeply-nested": (FormatError, ".".join("0" * 101), "nested deeper than 100 levels"),
    "deflated": (FormatError, RECORD, "is compressed; load the file in torch"),
    "directory-place-lies": (FormatError, None, "end of the zip contradicts its directory"),
    "duplicate-key": (FormatError, None, "key sound is given twice"),
    "duplicate-member": (FormatError, RECORD, "two members of one name"),
    "empty-file": (TruncatedFileError, None, "the file is empty"),
    "encrypted": (FormatError, RECORD, "is encrypted"),
    "exponential-key": (FormatError, None, "a key that holds a tuple"),
    "garbage": (FormatError, None, "is not a zip of torch.save"),
    "git-lfs-pointer": (FormatError, None, "run `git lfs pull`"),
    "key-of-many-bits": (FormatError, None, "a key of 65 bits"),
    "key-is-a-list": (FormatError, None, "a key that holds a list"),
    "legacy-pickle": (FormatError, None, "torch before 1.6; load it in torch"),
    "local-header-cut": (FormatError, RECORD, "has no local header"),
    "local-header-missing": (FormatError, RECORD, "has no local header"),
    "lone-surrogate": (FormatError, None, "surrogates not allowed"),
    "marks-only": (FormatError, None, "does not leave one object"),
    "member-past-eof": (TruncatedFileError, RECORD, "the file at 421"),
    "memo-never-written": (FormatError, None, "memo 3 was never written"),
    "name-without-end": (FormatError, None, "a name without an end"),
    "negated-lazily": (FormatError, WEIGHT, "lazy neg or conj bit"),
    "no-data-pkl": (FormatError, None, "0 members archive/data.pkl"),
    "name-endless": (FormatError, "archive/" + "w" * 72 + "...", "a name of more than 1000"),
    "no-version": (FormatError, "version", "states version b''; torch reads 1 to 10"),
    "stride-of-65-bits": (FormatError, WEIGHT, "an offset or stride that none can be"),
    "version-11": (FormatError, "version", "states version b'11\\n'"),
    "version-of-letters": (FormatError, "version", "states version b'new'"),
    "no-directory": (TruncatedFileError, None, "directory at the end of the zip is missing"),
    "no-stop": (FormatError, None, "it ends without STOP"),
    "overlapping-members": (FormatError, "archive/data/1", "overlaps the member before it"),
    "persistent-id-not-a-storage": (FormatError, None, "a persistent id that is no storage"),
    "pickle-attribute-of-allowed": (
        UnsafePickleError,
        None,
        "asks for collections.OrderedDict.fromkeys; nothing was executed",
    ),
    "pickle-builds-a-list": (UnsafePickleError, None, "sets the state of a list"),
    "pickle-calls-a-dict": (UnsafePickleError, None, "calls a dict"),
    "pickle-empty": (FormatError, None, "malformed at byte 0: it ends without STOP"),
    "pickle-eval-stacked": (UnsafePickleError, None, "asks for builtins.eval; nothing was"),
    "pickle-extension-registry": (UnsafePickleError, None, "makes an object with EXT1"),
    "pickle-inst": (UnsafePickleError, None, "asks for posix.system; nothing was executed"),
    "pickle-load-from-bytes": (UnsafePickleError, None, "torch.storage._load_from_bytes"),
    "pickle-name-escaped": (UnsafePickleError, None, "asks for col\\\\x6cections.OrderedDict;"),
    "pickle-name-with-space": (UnsafePickleError, None, "asks for torch Size.; nothing"),
    "pickle-newobj": (UnsafePickleError, None, "makes an object with NEWOBJ"),
    "pickle-os-system": (UnsafePickleError, None, "asks for posix.system; nothing was executed"),
    "protocol-9": (FormatError, None, "protocol 9 is unknown"),
    "recursive-dict": (FormatError, "itself", "a container holds itself"),
    "recursive-list": (FormatError, "0", "a container holds itself"),
    "shape-huge": (FormatError, WEIGHT, "is larger than memory"),
    "shape-negative": (FormatError, WEIGHT, "impossible size"),
    "shape-not-integers": (FormatError, None, "sizes that are no integers"),
    "sizes-disagree": (FormatError, RECORD, "is compressed"),
    "stack-underflow": (FormatError, None, "the stack is empty"),
    "storage-missing": (FormatError, "data/7", "not in the zip"),
    "storage-offset-negative": (FormatError, WEIGHT, "outside its storage of 6 elements"),
    "storage-offset-past-end": (FormatError, WEIGHT, "outside its storage of 6 elements"),
    "storage-past-eof": (FormatError, WEIGHT, "outside its storage of 6 elements"),
    "storage-size-wrong": (FormatError, "data/0", "holds 24 bytes, the pickle says 20"),
    "stride-negative": (FormatError, WEIGHT, "strides do not fit its shape"),
    "stride-too-few": (FormatError, WEIGHT, "strides do not fit its shape"),
    "stride-too-long": (FormatError, WEIGHT, "outside its storage of 6 elements"),
    "stride-zero": (FormatError, WEIGHT, "26388279066624 bytes of a storage of 24"),
    "text-of-4-gb": (FormatError, None, "expected 4294967295 bytes"),
    "too-many-axes": (FormatError, WEIGHT, "has 40 axes; at most 32"),
    "truncated": (TruncatedFileError, None, "directory at the end of the zip is missing"),
    "two-data-pkl": (FormatError, None, "2 members archive/data.pkl"),
    "two-objects": (FormatError, None, "does not leave one object"),
    "unknown-opcode": (FormatError, None, "opcode 0xff does not exist"),
}


def saved(value: object, path: Path, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


def bits(tensor: torch.Tensor) -> bytes:
    # Not contiguous(): it keeps the odd stride of an axis of size 1, which view() then refuses.
    dense = torch.clone(tensor.detach(), memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", DEFECTS)
def test_a_hostile_file_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, where, fragment = DEFECTS[name]
    path = HOSTILE / f"{name}.pt"
    monkeypatch.chdir(tmp_path)
    gc.freeze()  # what other tests have left is no part of the time
    begin = time.process_time()
    with pytest.raises(FormatError) as caught:
        read_torch_zip(path)
    taken = time.process_time() - begin
    gc.unfreeze()
    assert taken < 1
    assert type(caught.value) is error
    assert (caught.value.path, caught.value.where) == (path, where)
    assert fragment in caught.value.message
    assert not list(tmp_path.iterdir())


def test_every_hostile_file_is_in_the_table() -> None:
    assert {path.stem for path in HOSTILE.iterdir()} == DEFECTS.keys()


def test_the_malicious_fixture_is_live(tmp_path: Path) -> None:
    # If Python's own unpickler did nothing with it, refusing it would prove nothing.
    data = zipfile.ZipFile(HOSTILE / "pickle-os-system.pt").read("archive/data.pkl")
    command = [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"]
    subprocess.run(command, input=data, check=True, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapterkit-was-executed"]


def test_the_parts_of_the_hostile_files_are_sound(tmp_path: Path) -> None:
    # Each defect is the only one: without it, this reader and torch both accept the file.
    path = tmp_path / "sound.pt"
    path.write_bytes(build.archive(build.state(weight=build.tensor((3, 2), (1, 3)))))
    theirs = torch.load(path, weights_only=True)
    ours = read_torch_zip(path).tensors
    assert list(ours) == list(theirs) == ["sound", "weight"]
    assert all(bytes(ours[name].tobytes()) == bits(theirs[name]) for name in theirs)


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


def test_a_class_of_the_user_is_named_and_not_imported(tmp_path: Path) -> None:
    path = saved({"config": Path("somewhere")}, tmp_path / "x.pt")
    with pytest.raises(UnsafePickleError, match=r"asks for pathlib.*; nothing was executed"):
        read_torch_zip(path)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(build.archive(build.PROTO_2 + build.name("__torch__", "Net") + build.STOP))
    with pytest.raises(UnsafePickleError, match=r"__torch__\.Net"):
        read_torch_zip(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_torch_zip(tmp_path / "nowhere.bin")
    with pytest.raises(FormatError, match="is a directory"):
        read_torch_zip(tmp_path)


def test_a_long_pickle_is_refused_by_its_length(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(build.archive(bytes(MAX_PICKLE + 1)))
    with pytest.raises(FormatError, match=f"has {MAX_PICKLE + 1} bytes, the most is {MAX_PICKLE}"):
        read_torch_zip(path)


def test_opcodes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_OPCODES < MAX_PICKLE
    monkeypatch.setattr("adapterkit.containers.pickle_reader.MAX_OPCODES", 100)
    path = tmp_path / "x.pt"
    path.write_bytes(build.archive(build.EMPTY_LIST + (build.NONE + build.APPEND) * 50 + b"."))
    with pytest.raises(FormatError, match="more than 100 opcodes"):
        read_torch_zip(path)


def nested_laughs(levels: int) -> bytes:
    lists = (build.put(level) + b"](" + build.get(level) * 100 + b"e" for level in range(levels))
    return b"(]" + b"".join(lists) + b"t."


# pickle -> a part of the error, or None if it is read
FLOODS = {
    "empty lists": (b"(" + b"]" * 20_000 + b"t.", None),
    "lists of one": (b"(" + b"]Na" * 7_000 + b"t.", None),
    "marks": (b"(" * 20_000 + b".", "does not leave one object"),
    "memo": (b"N" + b"\x94" * 20_000 + b".", None),
    "copies": (
        b"(]" + build.put(0) + b"(" + b"K\x07" * 5_000 + b"e"
        + (build.name("builtins", "set") + build.get(0) + b"\x85R") * 500 + b"t.",
        "copy more than the pickle holds",
    ),
    "bytes": (
        build.name("builtins", "bytearray") + build.number(1 << 40) + b"\x85R.",
        "bytes of something that is not bytes",
    ),
    "laughs": (nested_laughs(30), "unfolds to"),
    "long keys": (
        b"}" + build.put(0) + build.text("k" * 5_000) + build.put(1)
        + b"".join(b"}" + build.get(1) for _ in range(90)) + build.tensor() + b"s" * 91 + b".",
        "more than 1000 letters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLOODS)
def test_memory_stays_within_a_constant_factor_of_the_file(kind: str, tmp_path: Path) -> None:
    pickled, fragment = FLOODS[kind]
    path = tmp_path / "x.pt"
    path.write_bytes(build.archive(b"\x80\x02" + pickled))
    outcome(path)  # imports and caches are not part of the measure
    tracemalloc.start()
    try:
        message = outcome(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message is None if fragment is None else fragment in message
    assert peak < 200 * path.stat().st_size + 200_000


def outcome(path: Path) -> str | None:
    try:
        flatten(read_torch_zip(path).root)
    except AdapterKitError as error:
        return error.message
    return None


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


def test_the_reader_has_no_way_to_execute() -> None:
    for name in ("pickle_names", "pickle_reader", "torch_zip", "torch_tensor"):
        source = (ROOT / f"adapterkit/containers/{name}.py").read_text()
        for word in ("import pickle\n", "importlib", "__import__", "getattr(", "eval(", "exec("):
            assert word not in source


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
