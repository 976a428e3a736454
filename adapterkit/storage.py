"""Byte ranges of files."""

from __future__ import annotations

import shutil
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import FormatError, NotFoundError, TruncatedFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from io import RawIOBase
    from typing import Self


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
        missing = Path(error.filename or path)
        raise NotFoundError(f"no such file or directory{alike(missing)}", path=missing) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise FormatError(f"could not be read ({reason})", path=error.filename or path) from error


def alike(path: Path) -> str:
    """Return what is known of a path without a file: where it leads, or what is called alike."""
    folder = path.parent
    try:
        if path.is_symlink():
            return f"; it is a link to {path.readlink()}, where nothing is: copy the file itself"
        names = [each.name for each in folder.iterdir() if not each.name.startswith(".")]
        if path.name in names:
            return ""
    except OSError:
        return ""
    found = get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / found[0]}?" if found else ""


def copy_file(source: Path, target: Path) -> None:
    """Write the bytes of a file to another; what stands against opening the source names it.

    Raises:
        NotFoundError: if there is no source.
        FormatError: if it cannot be opened.
        OSError: as the operating system says of the target.
    """
    with readable(source):
        data = source.open("rb")
    with data, target.open("wb") as copy:
        shutil.copyfileobj(data, copy)


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


def read_lines(path: Path, limit: int) -> list[str]:
    """Return the lines of a small text that are not blank.

    Raises:
        NotFoundError: if there is nothing at the path.
        FormatError: if it is no UTF-8 text, has more than `limit` bytes, or cannot be read.
    """
    data = read_document(path, limit)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"is no UTF-8 text at byte {error.start}", path=path) from None
    if "\0" in text:
        raise FormatError(f"is no text: character {text.index(chr(0))} is NUL", path=path)
    return [line for line in text.splitlines() if line.strip()]


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

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.length

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel with the whole path: another process may stand in another directory."""
        return FileSlice, (self.path.absolute(), self.offset, self.length)

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
            raise self.truncated()

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
            raise self.truncated()
        return data

    def truncated(self) -> TruncatedFileError:
        """Return the error that says that the file has become shorter than the range."""
        return TruncatedFileError(f"the file ends before byte {self.end}", path=self.path)


def neighbours(
    reads: Iterable[Callable[[], bytes | bytearray | memoryview]],
) -> Iterator[Callable[[], bytes | bytearray | memoryview]]:
    """Yield ways to read, in order, ranges of a file that follow one another as one range."""
    last: FileSlice | None = None
    for read in reads:
        if not isinstance(read, FileSlice):
            if last is not None:
                yield last
            last = None
            yield read
        elif last is not None and (read.path, read.offset) == (last.path, last.end):
            last = FileSlice(last.path, last.offset, last.length + read.length)
        else:
            if last is not None:
                yield last
            last = read
    if last is not None:
        yield last


class Ranges:
    """Reads ranges into memory that is used again, and holds the last one's file open.

    A file that is opened anew for each range is a dozen calls to the operating system, and as many
    waits for the interpreter's lock where several threads read.
    """

    def __init__(self) -> None:
        """Hold no file yet."""
        self._path: Path | None = None
        self._file: RawIOBase | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def read(self, span: FileSlice, buffer: memoryview) -> None:
        """Fill `buffer`, of the range's size.

        Raises:
            TruncatedFileError: if the file has become shorter than the range.
            FormatError: if it is gone or cannot be read.
        """
        try:
            done = self._filled(span, buffer)
        except OSError:
            with readable(span.path):
                raise
        if done != span.length:
            raise span.truncated()

    def _filled(self, span: FileSlice, buffer: memoryview) -> int:
        """Return how many bytes there were."""
        if self._file is None or self._path is not span.path:
            self.__exit__()
            with readable(span.path):
                self._file, self._path = span.path.open("rb", buffering=0), span.path
        self._file.seek(span.offset)
        done = 0
        while done < span.length and (count := self._file.readinto(buffer[done:])):
            done += count
        return done
