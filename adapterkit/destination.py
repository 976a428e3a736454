"""What may stand at a destination, and what of it an output replaces."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import DestinationExistsError, UsageError, WriteError

if TYPE_CHECKING:
    from collections.abc import Iterable


_HUB = "hf:"


@dataclass(frozen=True, slots=True)
class Directory:
    """A kind of directory that is written, and what of an existing one belongs to it.

    Attributes:
        what: one word for messages, such as `adapter`.
        marks: give the names or patterns of files of which one tells that a directory is of this
            kind. Asked only where there is a directory: looking for plug-ins takes a while.
        files: give the names or patterns of files that it consists of: a new one replaces all of
            them, and what else lies there stays.
    """

    what: str
    marks: Callable[[], tuple[str, ...]]
    files: Callable[[], tuple[str, ...]]

    def owns(self, name: str) -> bool:
        """Tell whether a file of this name is part of such a directory."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.files())

    def marked(self, folder: Path) -> bool:
        """Tell whether a directory is one of this kind."""
        names = [path.name for path in folder.iterdir() if path.is_file()]
        return any(fnmatch.fnmatchcase(name, mark) for name in names for mark in self.marks())


def check_name(destination: Path) -> None:
    """Refuse what names no file or folder that could be made here.

    Raises:
        UsageError: if it is empty, holds a NUL, or is a reference to the hub.
    """
    if not str(destination) or "\0" in str(destination):
        raise UsageError("no path that could be created", path=str(destination) or "''")
    if destination.parts[:1] == (_HUB,):
        message = "is a reference to the hub; name a file or folder here, and upload it then"
        raise UsageError(message, path=destination)


def check_destination(
    destination: Path,
    *,
    force: bool = False,
    directory: Directory | None = None,
    spared: Iterable[Path] = (),
) -> None:
    """Raise now what an output would raise first, before long work is done for nothing.

    Raises:
        DestinationExistsError: if there is something at the destination that is not to be replaced.
        WriteError: if nothing can be replaced there in one step.
        UsageError: if it is empty, or would replace what it is made from.
    """
    check_name(destination)
    try:
        mode = destination.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        # What `os.path` cannot look at is no file; a Path would raise for it.
        above = next((p for p in destination.parents if os.path.isfile(p)), None)  # noqa: PTH113
        reason = f"{above} is a file, no folder" if above else error.strerror or str(error)
        message = f"could not be written ({reason}); name another"
        raise WriteError(message, path=destination) from error
    if stat.S_ISLNK(mode):
        message = f"is a link to {destination.readlink()}; name what it points to"
    elif directory is None:
        message = _kept_file(mode, force=force)
    else:
        message = _kept_directory(destination, mode, directory, force=force)
    if message:
        raise DestinationExistsError(message, path=destination)
    victims = [destination]
    if directory is not None:
        _check_not_current(destination)
        victims = [path for path in destination.iterdir() if directory.owns(path.name)]
    check_spared(victims, spared, destination)


def check_report(destination: Path, *, what: str, begins: bytes, force: bool = False) -> None:
    """Raise what `check_destination` does, and where a report would replace anything but its like.

    Args:
        destination: file to create.
        what: one word for messages, such as `page`.
        begins: what every such report begins with; an empty file is none that is lost either.
        force: replace an earlier report.

    Raises:
        DestinationExistsError: if there is something at the destination that is not to be replaced.
        WriteError: if nothing can be replaced there in one step.
        UsageError: if it is empty.
    """
    check_destination(destination, force=force)
    try:
        with destination.open("rb") as file:
            begin = file.read(len(begins))
    except FileNotFoundError:
        return
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(f"cannot be looked at ({reason})", path=destination) from error
    if begin and begin.lower() != begins.lower():
        message = f"is no {what}, and is never replaced by one; name another"
        raise DestinationExistsError(message, path=destination)


def _kept_file(mode: int, *, force: bool) -> str:
    """Return why what is there is not replaced by a file; empty if it is."""
    if stat.S_ISDIR(mode):
        return "is a directory, and the output is a file; name another"
    if not stat.S_ISREG(mode):
        return "is no regular file, and is never replaced; name another"
    return "" if force else "exists already; pass --force to replace it"


def _kept_directory(path: Path, mode: int, directory: Directory, *, force: bool) -> str:
    """Return why what is there is not replaced by a directory; empty if it is."""
    if not stat.S_ISDIR(mode):
        return "is no directory, and the output is one; name another"
    if not any(path.iterdir()):
        return ""
    if not directory.marked(path):
        return f"is no {directory.what}, and what is there is never replaced; name another"
    return "" if force else "exists already; pass --force to replace it"


def _check_not_current(destination: Path) -> None:
    with suppress(OSError):
        if destination.samefile(Path.cwd()):
            raise WriteError(
                "is the current folder, which cannot be replaced; run this from another",
                path=destination,
            )


def check_spared(victims: Iterable[Path], spared: Iterable[Path], destination: Path) -> None:
    """Refuse to replace what an output is made from, or a file of a directory that it is.

    Raises:
        UsageError: if one of the victims is spared, links followed.
    """
    kept = {Path(os.path.realpath(path)) for path in spared}
    for victim in victims:
        real = Path(os.path.realpath(victim))
        if real in kept or real.parent in kept:
            raise UsageError(
                f"would replace {victim}, which it is made from; name another", path=destination
            )
