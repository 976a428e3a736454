"""A merge that is killed leaves nothing that could be loaded, and goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from checkpoint_bases import LINEAR, loaded, trained
from engine import BaseFixture, family_row, make_base

from adapterkit import merge_into
from adapterkit.containers.gguf import read_gguf
from adapterkit.containers.safetensors import read_safetensors
from adapterkit.errors import FormatError, UsageError, WriteError
from adapterkit.merging.into import journal
from adapterkit.merging.into.blocks import Merger
from adapterkit.merging.into.journal import JOURNAL, checksum
from adapterkit.storage import FileSlice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

# A merge that kills itself, as `kill -9` would, when so many percent of the bytes are done: at once
# up to 10, else when the next piece with a changed tensor is noted; at 100 when all are on the disk
# and nothing has its name yet.
SUICIDE = """
import os, signal, sys
from adapterkit import merge_into
from adapterkit.merging.into import checkpoint, gguf_file, journal, writing

journal.SEGMENT = 20_000
percent, reached = int(sys.argv[4]), 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def written(*arguments, write=writing.write_files):
    write(*arguments)
    die()

checkpoint.write_files = gguf_file.write_files = written

def noted(*arguments, finish=journal.Journal.finish):
    finish(*arguments)
    if percent < 100 and reached >= percent and arguments[-1].reports:
        die()

journal.Journal.finish = noted

def progress(done, total):
    global reached
    reached = 100 * done / total
    if percent <= 10 and reached >= percent:
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
    monkeypatch.setattr(journal, "SEGMENT", 20_000)
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
    assert bool(finished) == (percent > 10)
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
    assert bool(finished) == (percent > 10)
    monkeypatch.setattr(journal, "SEGMENT", 20_000)
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
    assert hashes(tmp_path / "merged").keys() == {*hashes(base), "adapterkit-proof.json"}
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


def killed(adapter: Path, base: Path, target: Path, percent: int = 60) -> Path:
    """Kill a merge when so much is written; return what it left."""
    done = subprocess.run(
        [sys.executable, "-c", SUICIDE, str(adapter), str(base), str(target), str(percent)],
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    return staging_of(target)


def segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT", 20_000)


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_another_base_under_the_same_names_sizes_and_times_is_refused(
    kind: str, tiny: BaseFixture, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments(monkeypatch)
    trained(tiny, tmp_path / "adapter", target_modules=LINEAR)
    mine = tmp_path / ("base" if kind == "hf" else "base.gguf")
    shutil.copytree(base, mine) if kind == "hf" else shutil.copy(tiny.gguf, mine)
    target = tmp_path / ("merged" if kind == "hf" else "merged.gguf")
    left = killed(tmp_path / "adapter", mine, target)
    twin = min(mine.glob("*.safetensors")) if kind == "hf" else mine
    status, data = twin.stat(), bytearray(twin.read_bytes())
    data[-64:] = bytes(64)
    twin.write_bytes(data)
    os.utime(twin, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UsageError, match="holds another merge"):
        merge_into([tmp_path / "adapter"], mine, target, resume=True)
    assert left.is_dir()
    assert not target.exists()
    merge_into([tmp_path / "adapter"], mine, target)
    assert not left.exists()


@pytest.mark.parametrize("kind", ["hf", "gguf"])
@pytest.mark.parametrize("where", ["computed", "copied", "shorter"])
def test_what_was_changed_since_is_refused_by_name(
    kind: str,
    where: str,
    tiny: BaseFixture,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segments(monkeypatch)
    trained(tiny, tmp_path / "adapter", target_modules=LINEAR)
    target = tmp_path / ("merged" if kind == "hf" else "merged.gguf")
    left = killed(tmp_path / "adapter", base if kind == "hf" else tiny.gguf, target, 100)
    _, *lines = map(json.loads, (left / JOURNAL).read_text().splitlines())
    line = next(line for line in lines if line["written"])
    folder = left if kind == "gguf" else left / "merged"
    file, at = folder / line["file"], line["written"][0][0]
    if where == "copied":
        file, at = next(place for path in folder.iterdir() for place in embeddings(path))
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data[:-1] if where == "shorter" else data)
    with pytest.raises(UsageError, match=f"{re.escape(file.name)}.*was changed since"):
        merge_into([tmp_path / "adapter"], base if kind == "hf" else tiny.gguf, target, resume=True)
    assert not target.exists()


def embeddings(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield where a table stands that the adapter does not touch."""
    if path.suffix in {".gguf", ".safetensors"}:
        read = read_gguf(path) if path.suffix == ".gguf" else read_safetensors(path)
        for name in read.tensors.keys() & {"token_embd.weight", "model.embed_tokens.weight"}:
            span = read.tensors[name].read
            assert isinstance(span, FileSlice)
            yield path, span.offset


@pytest.mark.parametrize(
    "text",
    ["{}\n", "[1]\n", '{"plan": 1}\nnull\n', "\xff\n", '{"plan": "x"}\n{"file": []}\n', "[" * 9999],
)
def test_a_malformed_journal_is_malformed_input(
    text: str, tiny: BaseFixture, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments(monkeypatch)
    trained(tiny, tmp_path / "adapter", target_modules=LINEAR)
    left = killed(tmp_path / "adapter", base, tmp_path / "merged")
    (left / JOURNAL).write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match="no journal of a merge"):
        merge_into([tmp_path / "adapter"], base, tmp_path / "merged", resume=True)


def test_nothing_is_written_through_a_link(
    tiny: BaseFixture, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments(monkeypatch)
    trained(tiny, tmp_path / "adapter", target_modules=LINEAR)
    merge_into([tmp_path / "adapter"], base, tmp_path / "whole")
    left = killed(tmp_path / "adapter", base, tmp_path / "merged")
    mine = tmp_path / "mine"
    mine.write_text("do not lose")
    for name in ("config.json", "generation_config.json", "other"):
        (left / "merged" / name).unlink(missing_ok=True)
        (left / "merged" / name).symlink_to(mine)
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", resume=True)
    assert hashes(tmp_path / "merged") == hashes(tmp_path / "whole")
    assert mine.read_text() == "do not lose"


@pytest.mark.parametrize("how", [os.symlink, os.link])
def test_a_finished_file_that_is_a_link_is_refused(
    how: Callable[[Path, Path], None],
    tiny: BaseFixture,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segments(monkeypatch)
    trained(tiny, tmp_path / "adapter", target_modules=LINEAR)
    left = killed(tmp_path / "adapter", base, tmp_path / "merged")
    _, line, *_ = map(json.loads, (left / JOURNAL).read_text().splitlines())
    file = left / "merged" / line["file"]
    file.rename(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    how(tmp_path / "elsewhere", file)
    with pytest.raises((UsageError, WriteError)):
        merge_into([tmp_path / "adapter"], base, tmp_path / "merged", resume=True)
    assert (tmp_path / "elsewhere").read_bytes() == before
    assert not (tmp_path / "merged").exists()


def test_a_last_line_that_was_cut_counts_for_nothing(
    tiny: BaseFixture, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments(monkeypatch)
    trained(tiny, tmp_path / "adapter", target_modules=LINEAR)
    merge_into([tmp_path / "adapter"], base, tmp_path / "whole")
    left = killed(tmp_path / "adapter", base, tmp_path / "merged")
    text = (left / JOURNAL).read_text()
    (left / JOURNAL).write_text(text[:-9])
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", resume=True)
    assert hashes(tmp_path / "merged") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("size", [1, 7, 8, 32_767, 32_768, 32_769, 100_001])
def test_a_checksum_tells_every_changed_byte(size: int) -> None:
    data = bytearray(np.random.default_rng(size).bytes(size))
    right = checksum(data)
    for place in {0, size // 2, size - 1}:
        data[place] ^= 1
        assert checksum(memoryview(data)) != right
        data[place] ^= 1
    assert checksum(bytes(data)) == right
    assert checksum(data[:-1]) != right
