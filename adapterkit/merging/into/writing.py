"""A file of the merged model: byte ranges of the base, and computed tensors, at known places.

Its size is known before the first byte is written, so several threads write to it in any order. It
is flushed to the disk and noted in the journal in segments, while the next ones are computed. The
main thread flushes: an error of a worker, or a signal, ends the wait at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.disk import copy_range, reserve, sync, sync_data, write_at
from adapterkit.errors import TruncatedFileError, UnsupportedError, UsageError
from adapterkit.merging.into.blocks import BLOCK, Merger, Sums, total
from adapterkit.merging.into.journal import Segment, Written, checksum
from adapterkit.merging.into.steps import Change
from adapterkit.storage import FileSlice, readable
from adapterkit.tensor import RowReader
from adapterkit.work import Crew, Task, in_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from adapterkit.merging.into.journal import Journal
    from adapterkit.merging.into.report import TensorReport
    from adapterkit.merging.into.rows import Place

    Progress = Callable[[int], None]

# Bytes that one task copies, and elements that one task computes, so that several threads find
# work at the end too and progress can be seen.
_RUN = 1 << 26
_TASK = 1 << 22
_IDLE = 0.02  # seconds between two flushes where nothing was written
_COMPARED = 1 << 22  # bytes that are compared at a time


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of an output file.

    Attributes:
        at: the first byte.
        content: a byte range of the base, or how the bytes are computed.
    """

    at: int
    content: FileSlice | Change

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        content = self.content
        return content.length if isinstance(content, FileSlice) else content.stored.nbytes


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to write.

    Attributes:
        name: its name in the output directory.
        header: the first bytes, in parts.
        pieces: everything after that, in order; what is between two of them is zeros.
        size: all bytes.
    """

    name: str
    header: Sequence[bytes | FileSlice]
    pieces: tuple[Piece, ...]
    size: int

    def spans(self) -> list[FileSlice]:
        """Return the byte ranges of the base that it is made from, a whole file where unknown."""
        contents = [piece.content for piece in self.pieces]
        reads = [c if isinstance(c, FileSlice) else c.source.read for c in contents]
        return [
            read if isinstance(read, FileSlice) else FileSlice(read.path, 0, 0)
            for read in reads
            if isinstance(read, (FileSlice, RowReader))
        ]

    def segments(self, size: int) -> list[tuple[Piece, ...]]:
        """Return the pieces in groups of about `size` bytes."""
        found: list[list[Piece]] = []
        held = size
        for piece in self.pieces:
            if held >= size:
                found.append([])
                held = 0
            found[-1].append(piece)
            held += piece.nbytes
        return [tuple(group) for group in found] or [()]


def write_files(
    files: Sequence[OutputFile], folder: Path, journal: Journal, jobs: int, progress: Progress
) -> list[TensorReport]:
    """Write what the journal does not have yet; return what was done to each changed tensor.

    Raises:
        FormatError: if an adapter or the base holds NaN or infinity.
        UnsupportedError: if a value does not fit the stored type, or too little of a change is
            left in it.
        UsageError: if something that the journal has was changed since.
        TruncatedFileError: if a file of the base has become shorter.
    """
    with ExitStack() as opened:
        begun = [_Begun(file, folder, journal, opened) for file in files]
        with Crew(jobs) as crew:
            for file in begun:
                file.submit(crew, progress)
            return [report for file in begun for report in file.finished(crew)]


class _Begun:
    """A file that is being written, and what the journal has of it already."""

    def __init__(self, file: OutputFile, folder: Path, journal: Journal, opened: ExitStack) -> None:
        self.path, self.name, self.journal = folder / file.name, file.name, journal
        self.segments = file.segments(journal.segment)
        numbers = range(len(self.segments))
        self.known = [journal.finished(file.name, number) for number in numbers]
        self.works: dict[int, list[tuple[_Copied | _Computed, list[Task[Sums]]]]] = {}
        found = any(segment is not None for segment in self.known)
        # What an earlier run has left is a file of its own, and no way to another.
        how = os.O_RDWR | (0 if found else os.O_CREAT | os.O_EXCL)
        how |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        if not found:
            self.path.unlink(missing_ok=True)
        self.target = os.open(self.path, how, 0o666)
        opened.callback(os.close, self.target)
        if found:
            self._check(file.size)
        else:
            reserve(self.target, file.size)
        _write_header(file.header, self.target)
        _write_gaps(file, self.target)

    def _check(self, size: int) -> None:
        """Raise if what is noted is not what is there."""
        status = os.fstat(self.target)
        if status.st_nlink != 1 or status.st_size != size:
            raise _changed(self.path)
        noted = [
            (segment, known)
            for segment, known in zip(self.segments, self.known, strict=True)
            if known is not None
        ]
        if not all(in_threads(lambda pair: _intact(*pair, self.path), noted)):
            raise _changed(self.path)

    def submit(self, crew: Crew, progress: Progress) -> None:
        """Have every segment written that is not yet."""
        for number, segment in enumerate(self.segments):
            if self.known[number] is not None:
                progress(sum(piece.nbytes for piece in segment))
                continue
            works = [_work(piece, self.target, progress) for piece in segment]
            self.works[number] = [
                (work, [crew.submit(task) for task in work.tasks()]) for work in works
            ]

    def finished(self, crew: Crew) -> Iterator[TensorReport]:
        """Flush and note one segment after the other; yield what was done."""
        for number, known in enumerate(self.known):
            done = known or self._flushed(self.works[number], crew)
            if known is None:
                self.journal.finish(self.name, number, done)
            yield from done.reports

    def _flushed(
        self, works: Sequence[tuple[_Copied | _Computed, Sequence[Task[Sums]]]], crew: Crew
    ) -> Segment:
        """Wait for a segment and flush it to the disk."""
        pending = [part for _, parts in works for part in parts]
        while not crew.wait(pending, _IDLE):
            sync_data(self.target)  # so that the disk is never idle while the processors are not
        made = [work.report(total(part.value for part in parts)) for work, parts in works]
        sync(self.target)
        return Segment(
            tuple(report for report in made if report is not None),
            tuple(written for work, _ in works for written in work.written),
        )


def _changed(path: Path) -> UsageError:
    return UsageError(
        "was changed since the merge that wrote it ended; repeat without --resume to begin anew",
        path=path,
    )


def _intact(segment: Sequence[Piece], noted: Segment, path: Path) -> bool:
    """Tell whether a noted segment is what was written: the base's bytes, the computed sums."""
    computed = [piece for piece in segment if isinstance(piece.content, Change)]
    at = {piece.at: piece.nbytes for piece in computed}
    ends: dict[int, int] = {}
    for written in sorted(noted.written):
        if checksum(FileSlice(path, written.at, written.length)()) != written.checksum:
            return False
        ends[written.at] = written.at + written.length
    for begin, nbytes in at.items():
        place = begin
        while place in ends and place < begin + nbytes:
            place = ends[place]
        if place != begin + nbytes:
            return False
    return all(
        _same(span, path, piece.at)
        for piece in segment
        if isinstance(span := piece.content, FileSlice)
    )


def _same(span: FileSlice, path: Path, at: int) -> bool:
    for begin in range(0, span.length, _COMPARED):
        length = min(_COMPARED, span.length - begin)
        here = FileSlice(path, at + begin, length)()
        if here != FileSlice(span.path, span.offset + begin, length)():
            return False
    return True


def _write_header(parts: Sequence[bytes | FileSlice], target: int) -> None:
    at = 0
    for part in parts:
        if isinstance(part, bytes):
            write_at(target, part, at)
            at += len(part)
        else:
            _copy(part, target, at)
            at += part.length


def _write_gaps(file: OutputFile, target: int) -> None:
    """Write the zeros between pieces, which a file that was taken up may not have."""
    at = sum(len(p) if isinstance(p, bytes) else p.length for p in file.header)
    for piece in file.pieces:
        write_at(target, bytes(piece.at - at), at)
        at = piece.at + piece.nbytes
    write_at(target, bytes(file.size - at), at)


def _copy(span: FileSlice, target: int, at: int) -> None:
    with readable(span.path):
        source = os.open(span.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        if copy_range(source, span.offset, target, at, span.length) != span.length:
            end = span.offset + span.length
            raise TruncatedFileError(f"the file ends before byte {end}", path=span.path)
    finally:
        os.close(source)


def _work(piece: Piece, target: int, progress: Progress) -> _Copied | _Computed:
    if isinstance(piece.content, FileSlice):
        return _Copied(piece.at, piece.content, target, progress)
    return _Computed(piece.at, piece.content, target, progress)


class _Copied:
    """A byte range of the base."""

    written: tuple[Written, ...] = ()

    def __init__(self, at: int, span: FileSlice, target: int, progress: Progress) -> None:
        self.at, self.span, self.target, self.progress = at, span, target, progress

    def tasks(self) -> list[Callable[[], Sums]]:
        """Return what is to be done, in any order."""
        return [partial(self._copy, begin) for begin in range(0, self.span.length, _RUN)]

    def _copy(self, begin: int) -> Sums:
        length = min(_RUN, self.span.length - begin)
        part = FileSlice(self.span.path, self.span.offset + begin, length)
        _copy(part, self.target, self.at + begin)
        self.progress(length)
        return Sums()

    def report(self, sums: Sums) -> None:
        """Return nothing: the base's tensor is unchanged."""


class _Computed:
    """A computed tensor, whose factors are in memory while it is worked on."""

    def __init__(self, at: int, change: Change, target: int, progress: Progress) -> None:
        self.at, self.change, self.target, self.progress = at, change, target, progress
        self.merger: Merger | None = None
        self.written: list[Written] = []
        self.lock = threading.Lock()
        self.left = 0

    def tasks(self) -> list[Callable[[], Sums]]:
        """Return what is to be done, in any order."""
        shares = _shares(Merger(self.change))
        found: list[Callable[[], Sums]] = [partial(self._compute, places) for places in shares]
        self.left = len(found)
        return found

    def _compute(self, places: Sequence[Place]) -> Sums:
        with self.lock:
            merger = self.merger = self.merger or Merger(self.change)
            merger.prepare()
        sums = merger.run(places, self._write)
        with self.lock:
            self.left -= 1
            if not self.left:
                self.merger = None
        return sums

    def _write(self, data: memoryview, offset: int) -> None:
        at = self.at + offset
        self.written.append(Written(at, len(data), checksum(data)))
        write_at(self.target, data, at)
        self.progress(len(data))

    def report(self, sums: Sums) -> TensorReport | None:
        """Return what the change did, if it was more than one of type."""
        if not self.change.steps:
            return None
        report = Merger(self.change).report(sums)
        if fault := _fault(self.change, report):
            raise UnsupportedError(
                f"as {self.change.dtype} {fault}; leave out --gguf-type, and it becomes q8_0, or "
                "pass --allow-weak",
                where=self.change.name,
            )
        return report


def _fault(change: Change, report: TensorReport) -> str | None:
    """Say why too little of an update is left, if it is."""
    if report.direction_error is not None:
        error = report.direction_error
        much = f"rounding errors along the update are {error:.0%} of it"
        return much if error > change.most else None
    if report.survival is not None and report.survival < change.least:
        return f"only {max(report.survival, 0.0):.0%} of the update is left"
    return None


def _shares(merger: Merger) -> Iterator[Sequence[Place]]:
    """Yield consecutive blocks of about a task's worth."""
    places = merger.places()
    count = 1 if merger.change.shaping else max(1, _TASK // BLOCK)
    for start in range(0, len(places), count):
        yield places[start : start + count]
