"""Hostile pickles: refused by name, in bounded memory, and nothing of them is executed."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from torch_files import HOSTILE, ROOT, bits, saved

from adapterkit.containers.pickle_reader import MAX_OPCODES, MAX_PICKLE
from adapterkit.containers.torch_zip import flatten, read_torch_zip
from adapterkit.errors import (
    AdapterKitError,
    FormatError,
    NotFoundError,
    TruncatedFileError,
    UnsafePickleError,
)
from fixtures.generators import torch_zip as build

pytestmark = pytest.mark.slow

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
    "garbage": (FormatError, None, "is text ('neither a zip nor a pickle')"),
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


def test_a_class_of_the_user_is_named_and_not_imported(tmp_path: Path) -> None:
    path = saved({"config": Path("somewhere")}, tmp_path / "x.pt")
    with pytest.raises(UnsafePickleError, match=r"asks for pathlib.*; nothing was executed"):
        read_torch_zip(path)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(build.archive(build.PROTO_2 + build.name("__torch__", "Net") + build.STOP))
    with pytest.raises(UnsafePickleError, match=r"__torch__\.Net"):
        read_torch_zip(path)


@pytest.mark.parametrize("name", ["notes", "other/data/0", "a2/x"])
def test_a_member_outside_of_the_archive_is_refused_as_torch_does(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, b"")
    with pytest.raises(RuntimeError, match="subdirectory"):
        torch.load(path, weights_only=True)
    with pytest.raises(FormatError, match=r"lies outside of a/, and torch would not read the file"):
        read_torch_zip(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [(".storage_alignment", b"6x"), (".data/serialization_id", b"12\xff")],
)
def test_records_that_torch_cannot_read_are_refused(name: str, text: bytes, tmp_path: Path) -> None:
    sound, path = tmp_path / "s.pt", tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, sound)
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(path, "w") as new:
        assert f"s/{name}" in old.namelist()
        for each in old.namelist():
            new.writestr(each, text if each == f"s/{name}" else old.read(each))
    with pytest.raises((ValueError, UnicodeDecodeError)):
        torch.load(path, weights_only=True)
    with pytest.raises(FormatError, match=f"{name}: holds"):
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


def test_the_reader_has_no_way_to_execute() -> None:
    for name in ("pickle_names", "pickle_reader", "torch_zip", "torch_tensor"):
        source = (ROOT / f"adapterkit/containers/{name}.py").read_text()
        for word in ("import pickle\n", "importlib", "__import__", "getattr(", "eval(", "exec("):
            assert word not in source
