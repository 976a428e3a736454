"""Byte ranges of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import TruncatedFileError


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
