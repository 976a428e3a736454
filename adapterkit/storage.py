"""Byte ranges of files, and output that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import DestinationExistsError, TruncatedFileError, WriteError

if TYPE_CHECKING:
    from collections.abc import Generator


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

    def read_into(self, buffer: memoryview) -> None:
        """Read the range into memory of its size, which can be used again.

        Raises:
            TruncatedFileError: if the file has become shorter than the range.
        """
        done = 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while done < self.length and (count := file.readinto(buffer[done:])):
                done += count
        if done != self.length:
            end = self.offset + self.length
            raise TruncatedFileError(f"the file ends before byte {end}", path=self.path)

    def __call__(self) -> bytes:
        """Read the range.

        Raises:
            TruncatedFileError: if the file has become shorter than the range.
        """
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            data = file.read(self.length)
            # An unbuffered read may return less than asked for without being at the end.
            while len(data) < self.length and (more := file.read(self.length - len(data))):
                data += more
        if len(data) != self.length:
            end = self.offset + self.length
            raise TruncatedFileError(f"the file ends before byte {end}", path=self.path)
        return data


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
