"""What every container checks before it trusts a byte, or a shape."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from adapterkit.errors import FormatError, TruncatedFileError
from adapterkit.storage import readable

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.dtype import DType

# The most that every supported numpy can hold: axes, and bytes counted without the empty axes.
MAX_AXES = 32
MAX_BYTES = 2**63 - 1
# Letters of the name of a tensor or member; the longest real ones have some two hundred.
MAX_NAME = 1000
_LFS_POINTER = b"version https://git-lfs"


def file_size(path: Path) -> int:
    """Return the size of a regular file that has something in it; nothing else is ever opened.

    Raises:
        NotFoundError: if there is nothing at `path`.
        TruncatedFileError: if the file is empty.
        FormatError: for a directory, a pipe or device, an unreadable file, or a Git LFS pointer.
    """
    with readable(path):
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise FormatError("is a directory, not a file", path=path)
        # A pipe would make the read wait for ever.
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("is not a regular file", path=path)
        with path.open("rb") as file:
            begin = file.read(len(_LFS_POINTER))
    if not begin:
        raise TruncatedFileError("the file is empty; download or copy it again", path=path)
    if begin == _LFS_POINTER:
        raise FormatError(
            "is a Git LFS pointer, not the file itself; run `git lfs pull`", path=path
        )
    return status.st_size


def check_shape(dtype: DType, shape: tuple[int, ...], *, path: Path, where: str) -> None:
    """Refuse a shape that no array can have, even an empty one.

    Raises:
        FormatError: if it has more than `MAX_AXES` axes, a negative size, or sizes whose product
            leaves the range of an address.
    """
    if len(shape) > MAX_AXES:
        raise FormatError(
            f"has {len(shape)} axes; at most {MAX_AXES} can be read", path=path, where=where
        )
    extent = dtype.block_bytes
    for size in shape:
        if not 0 <= size <= MAX_BYTES:
            raise FormatError("has an axis of impossible size", path=path, where=where)
        extent *= size or 1
    if extent > MAX_BYTES:
        raise FormatError(f"shape {list(shape)} is larger than memory", path=path, where=where)
