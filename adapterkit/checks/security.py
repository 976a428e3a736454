"""Findings about what a file could do to the program that loads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.checks.findings import Finding, Severity, named
from adapterkit.storage import readable as reading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_HEADER_LIMIT = 10 << 20


def check_security(path: Path, *, readable: bool = True) -> Iterator[Finding]:
    """Yield findings about the files at a path; contents are never executed.

    Args:
        path: file or directory.
        readable: whether it was read; what was not cannot be converted either.
    """
    with reading(path):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.is_symlink() and not _inside(file, path):
            message = f"is a link that leads to {file.readlink()}"
            yield Finding("AK403", Severity.WARNING, named(file.name), message)
        elif file.suffix in _PICKLES:
            hint = "convert it to safetensors (adapterkit convert SRC -o DIR) before you share it"
            hint = hint if readable else ""
            message = "is a pickle: programs that load it with pickle run what it says"
            yield Finding("AK401", Severity.WARNING, named(file.name), message, hint)
        elif file.suffix == ".safetensors" and file.is_file():
            yield from _header(file)


def _header(file: Path) -> Iterator[Finding]:
    with reading(file), file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > _HEADER_LIMIT:
        message = f"has a header of {length >> 20} MB"
        yield Finding("AK402", Severity.WARNING, named(file.name), message)


def _inside(file: Path, folder: Path) -> bool:
    root = folder if folder.is_dir() else folder.parent
    # Hub caches link their files to blobs two levels up; anything beyond that leads elsewhere.
    return file.resolve().is_relative_to(root.resolve().parent.parent)
