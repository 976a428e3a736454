"""What operating systems do differently on the way to a disk, said once each.

Linux, macOS and Windows differ in how a name is taken without replacing another, how two
directories change places in one step, and what it takes for bytes to be on the medium.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_CHUNK = 1 << 20
_MOST = 1 << 30
# What a kernel says where it cannot do this for these two files, or on this file system.
_UNABLE = {
    errno.EXDEV,
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
}
# renameat2(2) of Linux, renamex_np(2) of macOS.
_AT_FDCWD = -100
_LINUX = {"new": 1, "exchange": 2}
_MACOS = {"new": 4, "exchange": 2}
# A system without positioned reads and writes (Windows) moves the file's own position.
_POSITION = threading.Lock()


def host_name() -> str:
    """Return this machine's name, without importing `socket` for it."""
    return os.environ.get("COMPUTERNAME", "") if os.name == "nt" else os.uname().nodename


def rename_new(source: Path, target: Path) -> None:
    """Give a file or directory a name that nothing has.

    Raises:
        FileExistsError: if something has it, also where another process was first.
        OSError: as the operating system says.
    """
    if os.name == "nt":
        source.rename(target)
    elif _renamed(source, target, "new"):
        return
    elif source.is_dir():
        target.mkdir()
        source.replace(target)
    else:
        _take(source, target)


def _take(source: Path, target: Path) -> None:
    """Give a file a new name by a second link, or where there are none by holding its place."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
    else:
        source.unlink()
        return
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    source.replace(target)


def exchange(first: Path, second: Path) -> bool:
    """Let two directories change places in one step; False where the system cannot."""
    return os.name != "nt" and _renamed(first, second, "exchange")


def _renamed(source: Path, target: Path, how: str) -> bool:
    """Rename by the system's own call with a flag; False where there is none or it cannot."""
    call = _rename_call()
    if call is None:
        return False
    import ctypes

    if call(os.fsencode(source), os.fsencode(target), how) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@functools.cache
def _rename_call() -> Callable[[bytes, bytes, str], int] | None:
    import ctypes

    try:
        library: Any = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            macos = library.renamex_np
            return lambda source, target, how: macos(source, target, _MACOS[how])
        linux = library.renameat2
    except (OSError, AttributeError):
        return None
    return lambda source, target, how: linux(
        _AT_FDCWD, source, _AT_FDCWD, target, ctypes.c_uint(_LINUX[how])
    )


def sync(descriptor: int) -> None:
    """Have everything that was written to a file put on the medium."""
    if sys.platform == "darwin":
        import fcntl

        try:
            # fsync alone ends in the drive's own cache there.
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError:
            os.fsync(descriptor)
    else:
        os.fsync(descriptor)


def sync_data(descriptor: int) -> None:
    """Have the bytes of a file put on the medium, its times perhaps not."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a directory, so that no name comes before what it names."""
    if os.name == "nt" and path.is_dir():
        return  # directories cannot be opened there
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        sync(descriptor)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
    finally:
        os.close(descriptor)


def reserve(target: int, size: int) -> None:
    """Give a file its size, and its place on the disk: one that is too full says so at once.

    Raises:
        OSError: if there is not enough room, where the system can tell.
    """
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(target, 0, size)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
    os.truncate(target, size)


def write_at(target: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` at an offset; one system call may write less."""
    view = memoryview(data)
    while view:
        count = _write_some(target, view, at)
        view, at = view[count:], at + count


def _write_some(target: int, data: memoryview, at: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(target, data, at)
    with _POSITION:
        os.lseek(target, at, os.SEEK_SET)
        return os.write(target, data)


def read_at(source: int, length: int, at: int) -> bytes:
    """Read up to `length` bytes at an offset; fewer where the file ends."""
    if hasattr(os, "pread"):
        return os.pread(source, length, at)
    with _POSITION:
        os.lseek(source, at, os.SEEK_SET)
        return os.read(source, length)


def copy_range(source: int, begin: int, target: int, at: int, length: int) -> int:
    """Copy bytes between two open files, by the kernel where it can; fewer where the source ends.

    Returns:
        the number of bytes copied.
    """
    done = _copied_by_kernel(source, begin, target, at, length)
    while done < length:
        data = read_at(source, min(_CHUNK, length - done), begin + done)
        if not data:
            return done
        write_at(target, data, at + done)
        done += len(data)
    return done


def _copied_by_kernel(source: int, begin: int, target: int, at: int, length: int) -> int:
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
