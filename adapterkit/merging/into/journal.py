"""What an interrupted merge had finished, so that it can go on, and of what it was a merge."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from adapterkit.errors import AdapterKitError, FormatError, UsageError
from adapterkit.merging.into.report import NearestReport, TensorReport
from adapterkit.storage import read_document, readable
from adapterkit.tables import ANY_MAPPING, TEXT, Table, UnfitError, listed, number, whole

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence

    from adapterkit.merging.planning import Source
    from adapterkit.output import Output
    from adapterkit.storage import FileSlice

JOURNAL = "journal.jsonl"
# Counts up when the same merge would be written in other bytes.
_VERSION = 4
# A base counts by its headers and by so many bytes at a place of every so many; small files whole.
_SAMPLE = 1 << 12
_EVERY = 1 << 20
_SMALL = 1 << 24
# Bytes of a journal: some hundred for each tensor of a base.
_LARGEST = 1 << 30
_COUNT = whole(0, (1 << 63) - 1)
_REPORTS = listed(ANY_MAPPING)
_WRITTEN = listed(listed(_COUNT, 3, 3))
# Bytes after which what is written is flushed and noted; no more than this is done again.
SEGMENT = 1 << 26
# Numbers of 8 bytes whose sum stands for them in a checksum.
_BLOCK = 1 << 12


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""
        ...


class Written(NamedTuple):
    """Computed bytes of an output file.

    Attributes:
        at: the first byte.
        length: how many.
        checksum: of them.
    """

    at: int
    length: int
    checksum: int


def checksum(data: bytes | bytearray | memoryview) -> int:
    """Return the CRC-32 of the sums of blocks: ten times as fast as that of every byte.

    A byte that changed changes its block's sum; 8 bytes are one number, what is left of them counts
    as it is.
    """
    numbers = np.frombuffer(data, np.uint64, len(data) // 8)
    whole = len(numbers) // _BLOCK * _BLOCK
    sums = np.add.reduce(numbers[:whole].reshape(-1, _BLOCK), axis=1)
    return zlib.crc32(memoryview(data)[8 * whole :], zlib.crc32(sums.tobytes()))


@dataclass(frozen=True, slots=True)
class Segment:
    """A finished part of an output file.

    Attributes:
        reports: what was done to the tensors in it.
        written: what of it was computed; the rest is the base's own bytes.
    """

    reports: tuple[TensorReport, ...]
    written: tuple[Written, ...]


@dataclass
class Journal:
    """The finished segments of the files in a staging folder, one line each as they are finished.

    Attributes:
        path: where it is kept.
        segments: (file name, segment number) -> what is finished.
        segment: bytes of one, about.
    """

    path: Path
    segments: dict[tuple[str, int], Segment] = field(default_factory=dict[tuple[str, int], Segment])
    segment: int = field(default_factory=lambda: SEGMENT)

    def finished(self, file: str, segment: int) -> Segment | None:
        """Return a finished segment, or None if it is to be written."""
        return self.segments.get((file, segment))

    def finish(self, file: str, segment: int, done: Segment) -> None:
        """Note a segment that is on the disk."""
        line = {
            "file": file,
            "segment": segment,
            "reports": [asdict(report) for report in done.reports],
            "written": done.written,
        }
        self._append(line)

    def begin(self, plan: str) -> None:
        """Note what the merge is of."""
        self._append({"plan": plan})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_journal(path: Path) -> tuple[str, Journal]:
    """Return what a merge was of, and its journal; a last line that was cut counts for nothing.

    Raises:
        FormatError: if it is no journal.
    """
    try:
        text = read_document(path, _LARGEST).decode("utf-8")
        whole = text[: text.rindex("\n") + 1] if "\n" in text else ""
        first, *others = [
            Table(ANY_MAPPING.read(json.loads(line)), path) for line in whole.split("\n")[:-1]
        ]
        journal = Journal(path, dict(map(_segment, others)))
        plan = first.get("plan", TEXT)
    except (ValueError, RecursionError, UnfitError, FormatError) as error:
        raise FormatError(
            "is no journal of a merge; repeat without --resume to begin anew", path=path
        ) from error
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return plan, journal


def _segment(line: Table) -> tuple[tuple[str, int], Segment]:
    """Return a line of the journal by its place.

    Raises:
        FormatError: if something in it is of another type.
    """
    reports = [
        TensorReport(
            tensor=report.get("tensor", TEXT),
            modules=report.get("modules", listed(TEXT)),
            stored=report.get("stored", TEXT),
            dtype=report.get("dtype", TEXT),
            relative_norm=report.optional("relative_norm", number()),
            survival=report.optional("survival", number()),
            rounding=report.get("rounding", TEXT),
            noise=report.optional("noise", number()),
            direction_error=report.optional("direction_error", number()),
            output_error=report.optional("output_error", number()),
            nearest=_nearest(report.table("nearest")),
        )
        for report in (line.inner("reports", each) for each in line.get("reports", _REPORTS))
    ]
    written = [Written(*each) for each in line.get("written", _WRITTEN)]
    return (line.get("file", TEXT), line.get("segment", _COUNT)), Segment(
        tuple(reports), tuple(written)
    )


def _nearest(table: Table | None) -> NearestReport | None:
    names = ("survival", "noise", "direction_error")
    if table is None:
        return None
    found = {name: table.get(name, number()) for name in names}
    return NearestReport(**found, output_error=table.optional("output_error", number()))


def plan_hash(
    sources: Sequence[Source],
    spans: Iterable[FileSlice],
    others: Iterable[Path],
    settings: Mapping[str, Any],
) -> str:
    """Return a hash of all that the output depends on.

    Adapters and small files count whole; files with the base's weights by path, size, times of
    change, everything before the first tensor, and a sample of the rest.

    Args:
        sources: the adapters.
        spans: byte ranges of the base that are read.
        others: further files of the base.
        settings: what was asked for.
    """
    digest = hashlib.sha256(f"{_VERSION} ".encode())
    digest.update(json.dumps({**settings, "segment": SEGMENT}, sort_keys=True).encode())
    headers: defaultdict[Path, list[int]] = defaultdict(list)
    for span in spans:
        headers[span.path].append(span.offset)
    for path, offsets in sorted(headers.items()):
        _add_file(digest, path, min(offsets))
    for path in others:
        _add_file(digest, path, 0)
    for source in sources:
        digest.update(f"{source.weight} {source.patterns}\n".encode())
        digest.update(f"{dict(source.adapter.scales)}\n".encode())
        digest.update(repr(sorted(source.adapter.settings.items(), key=str)).encode())
        digest.update(repr(sorted(source.adapter.tied.items())).encode())
        for key, tensor in source.adapter.tensors.items():
            digest.update(f"{key} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()


def _add_file(digest: Digest, path: Path, header: int) -> None:
    with readable(path):
        _add(digest, path, header)


def _add(digest: Digest, path: Path, header: int) -> None:
    status = path.stat()
    real = os.path.realpath(path)
    # The time of the last change of the file's status is the one that nobody can set back.
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    digest.update(f"{real} {status.st_size} {times}\n".encode(errors="replace"))
    size = status.st_size
    with path.open("rb", buffering=0) as file:
        digest.update(file.read(size if size <= _SMALL else header))
        for start in range(header, size, _EVERY) if size > _SMALL else ():
            room = min(_EVERY, size - start) - _SAMPLE
            # Always the same place of this file and run of bytes, and another in each.
            spot = int.from_bytes(hashlib.sha256(f"{start}".encode()).digest()[:4], "little")
            file.seek(start + (spot % room if room > 0 else 0))
            digest.update(file.read(_SAMPLE))


@contextmanager
def journalled(output: Output, plan: str) -> Generator[Journal]:
    """Yield the journal of an output; what it has of an earlier run is there when it is taken up.

    With `resume`, whatever ends the block early but a refusal leaves the folder for the next.

    Raises:
        UsageError: if what is to be resumed is another merge.
        FormatError: if its journal is malformed.
    """
    path = output.folder / JOURNAL
    if output.left and path.is_file() and not path.is_symlink():
        known, journal = read_journal(path)
        if known != plan:
            raise UsageError(
                "holds another merge (other adapters, weights, base or options); repeat without "
                "--resume to begin anew",
                path=output.folder,
            )
        _sweep(output.folder, {path, output.path})
        if output.path.is_dir():
            _sweep(output.path, {output.path / file for file, _ in journal.segments})
    else:
        _sweep(output.folder, set())
        journal = Journal(path)
        journal.begin(plan)
    try:
        yield journal
    except AdapterKitError as error:
        output.kept = output.left and isinstance(error, UsageError)
        raise
    except BaseException:
        output.kept = output.resume
        raise


def _sweep(folder: Path, kept: set[Path]) -> None:
    """Remove what is not kept, links and whatever else lies there in the place of a file.

    A folder in which something is kept is swept in its turn: diffusers has one for each component.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if any(path in each.parents for each in kept):
                _sweep(path, kept)
            elif path not in kept:
                shutil.rmtree(path)
        elif path not in kept or path.is_symlink():
            path.unlink()
