"""Byte ranges of files, and output that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import (
    DestinationExistsError,
    FormatError,
    NotFoundError,
    TruncatedFileError,
    WriteError,
)

if TYPE_CHECKING:
    from collections.abc import Generator


@contextmanager
def readable(path: Path) -> Generator[None]:
    """Turn what the operating system has against reading `path` into errors that name the file.

    Raises:
        NotFoundError: if there is nothing at the path.
        FormatError: for every other refusal.
    """
    if "\0" in str(path):
        # Python says so with a ValueError; no operating system has such a file.
        raise NotFoundError("no such file or directory", path=path)
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError("no such file or directory", path=error.filename or path) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise FormatError(f"could not be read ({reason})", path=error.filename or path) from error


def read_document(path: Path, limit: int) -> bytes:
    """Return the whole of a small file; a pipe or device is never opened, it could wait for ever.

    Raises:
        NotFoundError: if there is nothing at the path.
        FormatError: if it is no regular file, has more than `limit` bytes, or cannot be read.
    """
    with readable(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("is not a regular file", path=path)
        if status.st_size > limit:
            raise FormatError(f"has {status.st_size} bytes, the most is {limit}", path=path)
        return path.read_bytes()


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A range of bytes in a file, read anew at each call.

    Reading a range keeps memory at the size of one tensor; a memory map would count every touched
    page, and a file truncated under it is a crash instead of an error.

    Attributes:
        path: the file.
        offset: first byte.
        length: number of bytes.
    """

    path: Path
    offset: int
    length: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel with the whole path: another process may stand in another directory."""
        return FileSlice, (self.path.absolute(), self.offset, self.length)

    def read_into(self, buffer: memoryview) -> None:
        """Read the range into memory of its size, which can be used again.

        Raises:
            TruncatedFileError: if the file has become shorter than the range.
            FormatError: if it is gone or cannot be read.
        """
        done = 0
        with readable(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while done < self.length and (count := file.readinto(buffer[done:])):
                done += count
        if done != self.length:
            raise self._truncated()

    def chunks(self, size: int) -> Generator[memoryview]:
        """Yield the range piece by piece, in memory of `size` bytes that is used again.

        Raises:
            TruncatedFileError: if the file has become shorter than the range.
            FormatError: if it is gone or cannot be read.
        """
        left = self.length
        buffer = memoryview(bytearray(min(left, size)))
        with readable(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while left and (count := file.readinto(buffer[: min(left, size)])):
                yield buffer[:count]
                left -= count
        if left:
            raise self._truncated()

    def __call__(self) -> bytes:
        """Read the range.

        Raises:
            TruncatedFileError: if the file has become shorter than the range.
            FormatError: if it is gone or cannot be read.
        """
        with readable(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            data = file.read(self.length)
            # An unbuffered read may return less than asked for without being at the end.
            while len(data) < self.length and (more := file.read(self.length - len(data))):
                data += more
        if len(data) != self.length:
            raise self._truncated()
        return data

    def _truncated(self) -> TruncatedFileError:
        end = self.offset + self.length
        return TruncatedFileError(f"the file ends before byte {end}", path=self.path)


@contextmanager
def staged(destination: Path, *, force: bool = False) -> Generator[Path]:
    """Yield a temporary path beside `destination`; move it into place on success, else remove it.

    Write a file or create a directory at the yielded path. Whatever ends the block early, an
    exception or an interrupt, leaves the destination as it was and no partial file.

    Args:
        destination: file or directory to create.
        force: replace an existing file, or existing files of the same names in a directory.

    Raises:
        DestinationExistsError: if there is something at `destination` and `force` is false.
        WriteError: if the operating system refuses (disk full, permission, missing parent).
    """
    folder = _temporary(destination, force=force)
    try:
        staging = folder / destination.name
        yield staging
        _move(staging, destination)
    except OSError as error:
        raise _write_error(error, destination) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_destination(destination: Path, *, force: bool = False) -> None:
    """Raise now what `staged` would raise first, before long work is done for nothing.

    Raises:
        DestinationExistsError: if there is something at `destination` and `force` is false.
        WriteError: if nothing can be created beside it.
    """
    _temporary(destination, force=force).rmdir()


def _temporary(destination: Path, *, force: bool) -> Path:
    if not force and _occupied(destination):
        raise DestinationExistsError("exists already; pass --force to replace it", path=destination)
    try:
        name = f".{destination.name}."
        return Path(tempfile.mkdtemp(prefix=name, suffix=".tmp", dir=destination.parent))
    except OSError as error:
        raise _write_error(error, destination) from error


def synced(path: Path) -> None:
    """Flush a written file to the disk, so that a rename never names data that is not there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _occupied(destination: Path) -> bool:
    if destination.is_dir():
        return any(destination.iterdir())
    return destination.exists()


def _move(staging: Path, destination: Path) -> None:
    if staging.is_dir():
        for file in sorted(staging.iterdir()):
            synced(file)
        if destination.is_dir():
            for file in sorted(staging.iterdir(), reverse=True):
                file.replace(destination / file.name)
        else:
            staging.chmod(0o777 & ~_umask())
            staging.replace(destination)
    else:
        synced(staging)
        staging.replace(destination)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_error(error: OSError, destination: Path) -> WriteError:
    reason = error.strerror or str(error)
    return WriteError(f"could not be written ({reason}); nothing was left behind", path=destination)
