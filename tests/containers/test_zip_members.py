"""A zip whose end or entries contradict it is another one to each program: it is refused."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapterkit.containers.zip_members import read_members
from adapterkit.errors import FormatError
from adapterkit.storage import FileSlice

END, ENTRY = b"PK\x05\x06", b"PK\x01\x02"
NAMES = ["a.npy", "b.npy", "c.npy"]


def archive(comment: bytes = b"", *, wide: bool = False) -> bytearray:
    """Return a sound zip; a wide one has the end that more than 65,535 members need."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name in NAMES:
            held = io.BytesIO()
            np.save(held, np.arange(3.0))
            file.writestr(name, held.getvalue())
        file.comment = comment
    data = bytearray(made.getvalue())
    if wide:
        place = data.rindex(END)
        _, _, _, here, entries, length, begin, _ = struct.unpack_from("<4s4H2LH", data, place)
        numbers = 44, 45, 45, 0, 0, here, entries, length, begin
        record = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", *numbers)
        locator = b"PK\x06\x07" + struct.pack("<LQL", 0, place, 1)
        end = END + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        data[place:] = record + locator + end
    return data


def members(data: bytes, folder: Path) -> list[str]:
    path = folder / "x.zip"
    path.write_bytes(data)
    return [member.name for member in read_members(FileSlice(path, 0, len(data)))]


@pytest.mark.parametrize("data", [archive(), archive(b"a comment"), archive(wide=True)])
def test_a_sound_zip_is_read(data: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.namelist() == NAMES
    assert members(data, tmp_path) == NAMES


def put(mark: bytes, offset: int, width: str, change: int) -> Callable[[bytearray], None]:
    """Return what adds to a number of the last record that begins with a mark."""

    def apply(data: bytearray) -> None:
        place = data.rindex(mark) + offset
        (old,) = struct.unpack_from(width, data, place)
        struct.pack_into(width, data, place, (old + change) % (1 << 8 * struct.calcsize(width)))

    return apply


def prefixed(data: bytearray) -> None:
    data[:0] = data[:64]


def followed(data: bytearray) -> None:
    data += b"more"


NARROW: dict[str, Callable[[bytearray], None]] = {
    "another part": put(END, 4, "<H", 1),
    "its directory in another part": put(END, 6, "<H", 1),
    "fewer entries here": put(END, 8, "<H", -1),
    "more entries": put(END, 10, "<H", 1),
    "a directory of another size": put(END, 12, "<L", -1),
    "a directory elsewhere": put(END, 16, "<L", -8),
    "a longer comment": put(END, 20, "<H", 1),
    "an entry in another part": put(ENTRY, 34, "<H", 1),
    "extra fields past the directory": put(ENTRY, 30, "<H", 1 << 8),
    "a comment past the directory": put(ENTRY, 32, "<H", 1 << 8),
    "a member that is a directory": put(ENTRY, 38, "<L", 0x10),
    "bytes before it": prefixed,
    "bytes after it": followed,
}
WIDE: dict[str, Callable[[bytearray], None]] = {
    "no record where the locator points": put(b"PK\x06\x07", 8, "<Q", 1),
    "its locator in another part": put(b"PK\x06\x07", 4, "<L", 1),
    "several parts": put(b"PK\x06\x07", 16, "<L", 1),
    "another part": put(b"PK\x06\x06", 16, "<L", 1),
    "fewer entries here": put(b"PK\x06\x06", 24, "<Q", -1),
    "more entries": put(b"PK\x06\x06", 32, "<Q", 1),
    "a directory of another size": put(b"PK\x06\x06", 40, "<Q", -1),
    "a directory past every file": put(b"PK\x06\x06", 48, "<Q", 1 << 63),
    "a narrow number that is another": put(END, 16, "<L", 5),
}


@pytest.mark.parametrize("name", NARROW)
def test_what_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    data = archive()
    NARROW[name](data)
    with pytest.raises(FormatError):
        members(data, tmp_path)


@pytest.mark.parametrize("name", WIDE)
def test_a_wide_end_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    data = archive(wide=True)
    WIDE[name](data)
    with pytest.raises(FormatError):
        members(data, tmp_path)
