"""Byte ranges from file to file, by the kernel where it can."""

from __future__ import annotations

import errno
import os

from adapterkit.errors import TruncatedFileError

_CHUNK = 1 << 20
_MOST = 1 << 30
# What the kernel says where it cannot copy between these two files itself.
_UNABLE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def copy_range(source: int, begin: int, target: int, at: int, length: int) -> None:
    """Copy bytes between two open files without moving either's position.

    Raises:
        TruncatedFileError: if the source has become shorter.
    """
    done = _by_kernel(source, begin, target, at, length)
    while done < length:
        data = os.pread(source, min(_CHUNK, length - done), begin + done)
        if not data:
            raise TruncatedFileError(f"a file of the base ends before byte {begin + length}")
        write_all(target, data, at + done)
        done += len(data)


def write_all(target: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` at an offset; one system call may write less."""
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, at)
        view, at = view[count:], at + count


def _by_kernel(source: int, begin: int, target: int, at: int, length: int) -> int:
    """Return how many bytes the kernel copied; the rest is for the caller."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(
                source, target, min(_MOST, length - done), begin + done, at + done
            )
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            return done
        if not count:
            return done
        done += count
    return done
