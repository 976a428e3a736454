"""A file of the merged model: byte ranges of the base, and computed tensors, at known places.

Its size is known before the first byte is written, so several threads write to it in any order. It
is flushed to the disk and noted in the journal in segments, while the next ones are computed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.errors import UnsupportedError
from adapterkit.merge.into.blocks import BLOCK, Merger, Sums, total
from adapterkit.merge.into.copying import copy_range, write_all
from adapterkit.merge.into.steps import Change
from adapterkit.storage import FileSlice

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from adapterkit.merge.into.journal import Journal
    from adapterkit.merge.into.report import TensorReport
    from adapterkit.merge.into.rows import Place

    Progress = Callable[[int], None]

# Bytes after which what is written is flushed and noted; no more than this is done again.
SEGMENT = 1 << 26
# Bytes that one task copies, and elements that one task computes, so that several threads find
# work at the end too and progress can be seen.
_RUN = 1 << 26
_TASK = 1 << 22
_IDLE = 0.02  # seconds between two flushes where nothing was written


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

    def origins(self) -> list[Path]:
        """Return the files of the base that it is made from."""
        contents = [piece.content for piece in self.pieces]
        spans = [c if isinstance(c, FileSlice) else c.source.read for c in contents]
        return sorted({span.path for span in spans if isinstance(span, FileSlice)})

    def segments(self) -> list[tuple[Piece, ...]]:
        """Return the pieces in groups of about `SEGMENT` bytes."""
        found: list[list[Piece]] = []
        held = SEGMENT
        for piece in self.pieces:
            if held >= SEGMENT:
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
        TruncatedFileError: if a file of the base has become shorter.
    """
    with ExitStack() as opened:
        begun = [_Begun(file, folder, journal, opened) for file in files]
        with _pools(jobs) as (pool, flusher):
            for file in begun:
                file.submit(pool, flusher, progress)
            futures = [future for file in begun for future in file.noted.values()]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for failed in filter(None, (future.exception() for future in done)):
                raise failed
            return [report for file in begun for report in file.reports()]


class _Begun:
    """A file that is being written, and what the journal has of it already."""

    def __init__(self, file: OutputFile, folder: Path, journal: Journal, opened: ExitStack) -> None:
        self.path, self.journal = folder / file.name, journal
        self.segments = file.segments()
        numbers = range(len(self.segments))
        self.known = [journal.finished(self.path, file.size, number) for number in numbers]
        self.noted: dict[int, Future[list[TensorReport]]] = {}
        found = any(reports is not None for reports in self.known)
        out = opened.enter_context(self.path.open("r+b" if found else "wb"))
        self.target = out.fileno()
        if None in self.known:
            _reserve(self.target, file.size)
            _write_header(file.header, self.target)

    def submit(self, pool: Executor, flusher: Executor, progress: Progress) -> None:
        """Have every segment written, flushed and noted that is not yet."""
        for number, segment in enumerate(self.segments):
            if self.known[number] is not None:
                progress(sum(piece.nbytes for piece in segment))
                continue
            works = [_work(piece, self.target, progress) for piece in segment]
            tasks = [(work, [pool.submit(task) for task in work.tasks()]) for work in works]
            note = partial(self.journal.finish, self.path, number)
            self.noted[number] = flusher.submit(_flushed, tasks, self.target, note)

    def reports(self) -> Iterator[TensorReport]:
        """Yield what was done."""
        for number, reports in enumerate(self.known):
            yield from self.noted[number].result() if reports is None else reports


def _reserve(target: int, size: int) -> None:
    """Give a file its size, and its place on the disk: one that is too full says so at once."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(target, 0, size)
    else:
        os.truncate(target, size)


def _write_header(parts: Sequence[bytes | FileSlice], target: int) -> None:
    at = 0
    for part in parts:
        if isinstance(part, bytes):
            write_all(target, part, at)
            at += len(part)
        else:
            _copy(part, target, at)
            at += part.length


def _copy(span: FileSlice, target: int, at: int) -> None:
    source = os.open(span.path, os.O_RDONLY)
    try:
        copy_range(source, span.offset, target, at, span.length)
    finally:
        os.close(source)


@contextmanager
def _pools(jobs: int) -> Generator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """Yield workers, and one thread that flushes; an error or interrupt ends both early."""
    with ThreadPoolExecutor(jobs) as pool, ThreadPoolExecutor(1) as flusher:
        try:
            yield pool, flusher
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            flusher.shutdown(wait=False, cancel_futures=True)
            raise


def _flushed(
    tasks: Sequence[tuple[_Copied | _Computed, Sequence[Future[Sums]]]],
    target: int,
    note: Callable[[list[TensorReport]], None],
) -> list[TensorReport]:
    """Wait for a segment, flush it to the disk, and only then note it."""
    pending = [part for _, parts in tasks for part in parts]
    while wait(pending, timeout=_IDLE).not_done:
        os.fdatasync(target)  # so that the disk is never idle while the processors are not
    made = [work.report(total(part.result() for part in parts)) for work, parts in tasks]
    reports = [report for report in made if report is not None]
    os.fsync(target)
    note(reports)
    return reports


def _work(piece: Piece, target: int, progress: Progress) -> _Copied | _Computed:
    if isinstance(piece.content, FileSlice):
        return _Copied(piece.at, piece.content, target, progress)
    return _Computed(piece.at, piece.content, target, progress)


class _Copied:
    """A byte range of the base."""

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
        self.lock = threading.Lock()
        self.left = 0

    def tasks(self) -> list[Callable[[], Sums]]:
        """Return what is to be done, in any order."""
        shares = _shares(Merger(self.change).places())
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
        write_all(self.target, data, self.at + offset)
        self.progress(len(data))

    def report(self, sums: Sums) -> TensorReport | None:
        """Return what the change did, if it was more than one of type."""
        if not self.change.steps:
            return None
        report = Merger(self.change).report(sums)
        if report.survival is not None and report.survival < self.change.least:
            left = max(report.survival, 0.0)
            raise UnsupportedError(
                f"as {self.change.dtype} only {left:.0%} of the update is left; leave "
                "out --gguf-type, and it becomes q8_0, or --force it",
                where=self.change.name,
            )
        return report


def _shares(places: Sequence[Place]) -> Iterator[Sequence[Place]]:
    """Yield consecutive blocks of about a task's worth."""
    count = max(1, _TASK // BLOCK)
    for start in range(0, len(places), count):
        yield places[start : start + count]
