"""Safetensors shards of a merged checkpoint: byte ranges of the base, and computed tensors."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.containers.safetensors import PREFIX, read_safetensors
from adapterkit.errors import UnsupportedError
from adapterkit.merge.into.blocks import Merger, total
from adapterkit.merge.into.copying import copy_range, write_all
from adapterkit.merge.into.steps import Change
from adapterkit.storage import FileSlice, synced
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from adapterkit.base.decoding import RowReader
    from adapterkit.merge.into.report import TensorReport

    Progress = Callable[[int], None]

# Bytes that one task copies, so that several threads find work and progress can be seen.
_RUN = 1 << 26


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a shard to write.

    Attributes:
        name: stored name.
        tensor: type and shape to store; its byte range if it is copied.
        change: how it is computed, if it is.
    """

    name: str
    tensor: LazyTensor
    change: Change | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the checkpoint.

    Attributes:
        path: the base's file.
        entries: what to write, in order.
        rewritten: whether names, types or shapes differ from the base's, so that the header must.
    """

    path: Path
    entries: tuple[Entry, ...]
    rewritten: bool

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return sum(entry.tensor.nbytes for entry in self.entries)


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes that are next to each other in the base and in the output."""

    path: Path
    begin: int
    at: int
    length: int


def write_shard(shard: Shard, path: Path, jobs: int, progress: Progress) -> list[TensorReport]:
    """Write one file whole and flush it; return what was done to its changed tensors."""
    header = _header(shard)
    tasks = list(_tasks(shard, len(header)))
    with path.open("xb") as file:
        target = file.fileno()
        write_all(target, header, 0)
        os.truncate(target, len(header) + shard.nbytes)
        work = partial(_done, target=target, progress=progress)
        reports = _in_pool(work, tasks, jobs)
    synced(path)
    return [report for report in reports if report is not None]


def _in_pool(
    work: Callable[[Any], TensorReport | None], tasks: Sequence[Any], jobs: int
) -> list[TensorReport | None]:
    if jobs == 1:
        return [work(task) for task in tasks]
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(work, tasks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _done(
    task: _Run | tuple[Change, int], *, target: int, progress: Progress
) -> TensorReport | None:
    if isinstance(task, _Run):
        source = os.open(task.path, os.O_RDONLY)
        try:
            copy_range(source, task.begin, target, task.at, task.length)
        finally:
            os.close(source)
        progress(task.length)
        return None
    change, begin = task
    merger = Merger(change)

    def sums() -> Iterator[Any]:
        for place in merger.places():
            data, part = merger.block(place)
            write_all(target, data, begin + merger.offset(place))
            progress(len(data))
            yield part

    found = total(sums())
    return merger.report(found) if change.steps else None


def _tasks(shard: Shard, begin: int) -> Iterator[_Run | tuple[Change, int]]:
    """Yield computed tensors first, the longest work, then runs of untouched bytes."""
    at = begin
    runs: list[_Run] = []
    for entry in shard.entries:
        span = entry.tensor.read
        if entry.change is not None:
            yield entry.change, at
        elif isinstance(span, FileSlice):
            last = runs[-1] if runs else None
            joins = (
                last is not None
                and (last.path, last.begin + last.length, last.at + last.length)
                == (span.path, span.offset, at)
                and last.length + span.length <= _RUN
            )
            if last is not None and joins:
                runs[-1] = _Run(last.path, last.begin, last.at, last.length + span.length)
            else:
                runs.append(_Run(span.path, span.offset, at, span.length))
        at += entry.tensor.nbytes
    yield from runs


def _header(shard: Shard) -> bytes:
    """Return the base's own header, or one with the new types and shapes, metadata kept."""
    if not shard.rewritten:
        with shard.path.open("rb") as file:
            prefix = file.read(PREFIX)
            return prefix + file.read(int.from_bytes(prefix, "little"))
    fields: dict[str, object] = {}
    if metadata := read_safetensors(shard.path).metadata:
        fields["__metadata__"] = dict(metadata)
    end = 0
    for entry in shard.entries:
        begin, end = end, end + entry.tensor.nbytes
        fields[entry.name] = {
            "dtype": entry.tensor.dtype.value,
            "shape": list(entry.tensor.shape),
            "data_offsets": [begin, end],
        }
    data = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-len(data) % PREFIX)
    return len(data).to_bytes(PREFIX, "little") + data


def planned_shards(
    tensors: Mapping[str, LazyTensor],
    changes: Mapping[str, Change],
    other: Collection[Path] = (),
) -> list[Shard]:
    """Return the files to write: the base's, in its order, with what is new beside what it is from.

    Args:
        tensors: the base's, stored or decoded.
        changes: by name.
        other: files of the base that hold more tensors than these, or others.

    Raises:
        UnsupportedError: if a new tensor is from nowhere in the base.
    """
    files: dict[Path, list[Entry]] = {}
    rewritten = set(other)
    for name, tensor in tensors.items():
        path = _file(tensor)
        change = changes.get(name)
        files.setdefault(path, []).append(Entry(name, change.stored if change else tensor, change))
        if change and (change.dtype, change.shape) != (tensor.dtype, tensor.shape):
            rewritten.add(path)
    for name, change in changes.items():
        if name in tensors:
            continue
        path = _file(change.source)
        if path not in files:
            raise UnsupportedError("is from no file of the base", where=name)
        span = isinstance(change.source.read, FileSlice)
        same = span and not change.steps and change.dtype is change.source.dtype
        entry = Entry(name, change.source) if same else Entry(name, change.stored, change)
        files[path].append(entry)
        rewritten.add(path)
    return [Shard(path, tuple(entries), path in rewritten) for path, entries in files.items()]


def _file(tensor: LazyTensor) -> Path:
    return cast("FileSlice | RowReader", tensor.read).path
