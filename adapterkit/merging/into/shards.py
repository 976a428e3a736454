"""Safetensors shards of a merged checkpoint: what stands where in each file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from adapterkit.containers.safetensors import PREFIX, read_safetensors
from adapterkit.errors import UnsupportedError
from adapterkit.merging.into.steps import Change
from adapterkit.merging.into.writing import OutputFile, Piece
from adapterkit.stamps import OURS
from adapterkit.storage import FileSlice, readable
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from adapterkit.tensor import RowReader


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

    def output(self) -> OutputFile:
        """Return the file to write."""
        header = _header(self)
        pieces = tuple(_joined(_pieces(self.entries, len(header))))
        return OutputFile(self.path.name, (header,), pieces, len(header) + self.nbytes)


def _pieces(entries: Sequence[Entry], at: int) -> Iterator[Piece]:
    for entry in entries:
        yield Piece(at, entry.change or cast("FileSlice", entry.tensor.read))
        at += entry.tensor.nbytes


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Yield the pieces, byte ranges that are neighbours in the base as one."""
    held: Piece | None = None
    for piece in pieces:
        before, here = held.content if held else None, piece.content
        if (
            held is not None
            and isinstance(before, FileSlice)
            and isinstance(here, FileSlice)
            and (before.path, before.offset + before.length) == (here.path, here.offset)
        ):
            length = before.length + here.length
            held = Piece(held.at, FileSlice(before.path, before.offset, length))
            continue
        if held is not None:
            yield held
        held = piece
    if held is not None:
        yield held


def _header(shard: Shard) -> bytes:
    """Return the base's own header, or one with the new types and shapes, metadata kept."""
    metadata = read_safetensors(shard.path).metadata
    kept = {key: text for key, text in metadata.items() if not key.startswith(OURS)}
    if not shard.rewritten and kept == metadata:
        with readable(shard.path), shard.path.open("rb") as file:
            prefix = file.read(PREFIX)
            return prefix + file.read(int.from_bytes(prefix, "little"))
    fields: dict[str, object] = {}
    if kept:
        fields["__metadata__"] = kept
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
        path = stored_in(tensor)
        change = changes.get(name)
        files.setdefault(path, []).append(Entry(name, change.stored if change else tensor, change))
        if change and (change.dtype, change.shape) != (tensor.dtype, tensor.shape):
            rewritten.add(path)
    for name, change in changes.items():
        if name in tensors:
            continue
        path = stored_in(change.source)
        if path not in files:
            raise UnsupportedError("is from no file of the base", where=name)
        span = isinstance(change.source.read, FileSlice)
        same = span and not change.steps and change.dtype is change.source.dtype
        entry = Entry(name, change.source) if same else Entry(name, change.stored, change)
        files[path].append(entry)
        rewritten.add(path)
    return [Shard(path, tuple(entries), path in rewritten) for path, entries in files.items()]


def stored_in(tensor: LazyTensor) -> Path:
    """Return the file of the base that holds a tensor, or most of it."""
    return cast("FileSlice | RowReader", tensor.read).path
