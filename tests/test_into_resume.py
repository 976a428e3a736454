"""A merge that is killed leaves nothing that could be loaded, and goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from engine import BaseFixture, family_row, make_base
from test_into_checkpoint import LINEAR, loaded, trained

from adapterkit.errors import UsageError, WriteError
from adapterkit.merge.into import entry, merge_into, writing
from adapterkit.merge.into.blocks import Merger
from adapterkit.merge.into.journal import JOURNAL

if TYPE_CHECKING:
    from pathlib import Path

# A merge that kills itself, as `kill -9` would, as soon as so many bytes are done; at 100 when all
# are on the disk and noted, and nothing has its name yet.
SUICIDE = """
import os, signal, sys, time
from adapterkit.merge.into import checkpoint, entry, merge_into, writing

writing.SEGMENT = entry.SEGMENT = 20_000

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def written(*arguments, write=writing.write_files):
    write(*arguments)
    die()

checkpoint.write_files = entry.write_files = written

def progress(done, total):
    if int(sys.argv[4]) < 100 and done >= int(sys.argv[4]) * total / 100:
        time.sleep(0.5)  # what is whole by now is flushed and noted
        die()

merge_into([sys.argv[1]], sys.argv[2], sys.argv[3], progress=progress, resume=True, jobs=2)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def base(tiny: BaseFixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "base"
    loaded(tiny.hf).to(torch.bfloat16).save_pretrained(folder, max_shard_size="50KB")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def staging_of(destination: Path) -> Path:
    begun = f".{destination.name}.adapterkit-"
    (left,) = [path for path in destination.parent.iterdir() if path.name.startswith(begun)]
    return left


def noted(staging: Path) -> set[str]:
    """Return the changed tensors that the journal of a killed merge has."""
    _, *lines = map(json.loads, (staging / JOURNAL).read_text().splitlines())
    return {report["tensor"] for line in lines for report in line["reports"]}


def watched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return a set that gets the names of the tensors that are computed from now on."""
    computed: set[str] = set()
    prepare = Merger.prepare

    def counted(merger: Merger) -> None:
        computed.add(merger.change.name)
        prepare(merger)

    monkeypatch.setattr(Merger, "prepare", counted)
    return computed


@pytest.mark.parametrize("percent", [1, 40, 75, 100])
def test_killed_and_resumed_it_gives_the_same_bytes(
    percent: int,
    tiny: BaseFixture,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = tmp_path / "adapter"
    trained(tiny, adapter, target_modules=LINEAR)
    whole, target = tmp_path / "whole", tmp_path / "merged"
    monkeypatch.setattr(writing, "SEGMENT", 20_000)
    monkeypatch.setattr(entry, "SEGMENT", 20_000)
    merge_into([adapter], base, whole)
    done = subprocess.run(
        [sys.executable, "-c", SUICIDE, str(adapter), str(base), str(target), str(percent)],
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    left = staging_of(target)
    assert not (left / "merged" / "model.safetensors.index.json").exists() or percent == 100
    finished = noted(left)
    assert finished or percent < 100
    other = tmp_path / "other"
    trained(tiny, other, seed=9, target_modules=LINEAR)
    with pytest.raises(UsageError, match="holds another merge"):
        merge_into([other], base, target, resume=True)
    computed = watched(monkeypatch)
    report = merge_into([adapter], base, target, resume=True)
    assert finished.isdisjoint(computed)
    assert {tensor.tensor for tensor in report.tensors} == finished | computed
    assert hashes(target) == hashes(whole)
    assert report.tensors == merge_into([adapter], base, tmp_path / "again").tensors
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("percent", [1, 40, 75, 100])
def test_a_gguf_goes_on_too(
    percent: int, tiny: BaseFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, whole, target = (tmp_path / name for name in ("adapter", "whole.gguf", "merged.gguf"))
    trained(tiny, adapter, target_modules=LINEAR)
    merge_into([adapter], tiny.gguf, whole)
    done = subprocess.run(
        [sys.executable, "-c", SUICIDE, str(adapter), str(tiny.gguf), str(target), str(percent)],
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    finished = noted(staging_of(target))
    assert finished or percent < 100
    monkeypatch.setattr(writing, "SEGMENT", 20_000)
    monkeypatch.setattr(entry, "SEGMENT", 20_000)
    computed = watched(monkeypatch)
    report = merge_into([adapter], tiny.gguf, target, resume=True)
    assert finished.isdisjoint(computed)
    assert {tensor.tensor for tensor in report.tensors} == finished | computed
    assert target.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_without_resume_a_killed_merge_is_swept_away(
    tiny: BaseFixture, base: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    trained(tiny, adapter, target_modules=["q_proj"])
    left = tmp_path / ".merged.adapterkit-abcd1234"
    (left / "merged").mkdir(parents=True)
    (left / "merged" / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    merge_into([adapter], base, tmp_path / "merged")
    assert hashes(tmp_path / "merged").keys() == hashes(base).keys()
    assert not left.exists()


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_number_of_jobs_changes_no_byte(
    jobs: int, tiny: BaseFixture, base: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    trained(tiny, adapter, target_modules=LINEAR, use_dora=True)
    seen: list[tuple[int, int]] = []
    merge_into(
        [adapter], base, tmp_path / "a", jobs=jobs, progress=lambda d, t: seen.append((d, t))
    )
    merge_into([adapter], base, tmp_path / "b", jobs=2)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_full_disk_leaves_nothing(
    tiny: BaseFixture, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    trained(tiny, adapter, target_modules=["q_proj"])

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteError, match="No space left on device"):
        merge_into([adapter], base, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
