"""A path that appears whole or not at all, and replaces nothing that is no output of its kind.

Everything that adapterkit writes goes this way: beside the destination, under a hidden name of its
own, flushed to the disk, and then into place in one step. A killed process leaves the old output or
the new one, and a hidden folder that the next writer of the same destination sweeps away.
"""

from __future__ import annotations

import _thread
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from adapterkit.destination import check_destination, check_spared
from adapterkit.disk import exchange, host_name, rename_new, sync_path
from adapterkit.errors import DestinationExistsError, WriteError
from adapterkit.work import Task, begin_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from types import TracebackType

    from filelock import BaseFileLock

    from adapterkit.destination import Directory

_Result = TypeVar("_Result")

_MARK = "adapterkit"
_FORMER = ".former"
# Bytes of a name that hidden names repeat; file systems allow 255 in all.
_SHOWN = 150
# Seconds after which who waits looks again, should the end have been missed.
_MOMENT = 0.05
_TRIES = 5
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class Output:
    """One destination that is being written: locked, beside it, and moved into place at the end.

    As a context manager it holds the destination until the block ends. If the block ends early, by
    an error or an interrupt, the destination is as it was and nothing is left; a block that ends
    normally must have made a file or directory at `path`.

    Attributes:
        destination: as it was given.
        path: where to write.
        folder: the hidden folder around `path`, for what is needed only until the end.
        left: the folder of an earlier writer that was killed, with `resume`.
        kept: set it to have an early end leave the folder for a later `resume`.
    """

    def __init__(
        self,
        destination: Path,
        *,
        force: bool = False,
        directory: Directory | None = None,
        spared: Iterable[Path] = (),
        resume: bool = False,
    ) -> None:
        """Describe an output; nothing happens before the block is entered.

        Args:
            destination: file or directory to create; missing parents are made.
            force: replace a regular file, or the parts of a directory that belong to its kind.
            directory: the kind of directory to create; None for a file.
            spared: what the output is made from and must not be replaced by it.
            resume: take up what an earlier writer left that was killed.
        """
        self.destination = destination
        self.force = force
        self.directory = directory
        self.spared = tuple(spared)
        self.resume = resume
        self.left = False
        self.kept = False
        self._absolute = Path(os.path.abspath(destination))  # noqa: PTH100  (links stay links)
        self._made: list[Path] = []
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> Self:
        """Hold the destination.

        Raises:
            DestinationExistsError: if there is something at the destination that is not to be
                replaced.
            WriteError: if another process is writing it, or the operating system refuses.
        """
        check_destination(
            self.destination, force=self.force, directory=self.directory, spared=self.spared
        )
        try:
            uninterrupted(self._take)
        except BaseException as error:
            uninterrupted(lambda: self._end(kept=False))
            if isinstance(error, OSError):
                raise self._refusal(error) from error
            raise
        return self

    def _take(self) -> None:
        self._made = _made(self._absolute.parent)
        self._lock = self._locked()
        self._take_up()
        check_destination(
            self.destination, force=self.force, directory=self.directory, spared=self.spared
        )
        self.path = self.folder / self._absolute.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Move what was written into place, or remove it.

        Raises:
            WriteError: if the operating system refuses, in the block too.
            DestinationExistsError: if another program has taken the name meanwhile.
        """
        if error is not None:
            uninterrupted(lambda: self._end(kept=self.kept))
            if self.kept:
                error.add_note(f"what is finished is kept in {self.folder}; --resume goes on there")
            if isinstance(error, OSError):
                raise self._refusal(error) from error
            return
        try:
            uninterrupted(self._finish)
        except OSError as refusal:
            raise self._refusal(refusal) from refusal
        except BaseException as late:
            if isinstance(late, Exception):
                raise
            late.add_note(f"{self.destination} is complete")
            raise

    def _finish(self) -> None:
        try:
            _sync_all(self.path)
            self._move()
            with suppress(OSError):
                sync_path(self._absolute.parent)
            self._made = []
        finally:
            self._end(kept=False)

    def _move(self) -> None:
        target, former = self._absolute, self._absolute
        try:
            if self.directory is None:
                if self.force:
                    self.path.replace(target)
                else:
                    rename_new(self.path, target)
            elif former.is_dir() and any(former.iterdir()):
                self._replace_directory(self.directory)
            elif former.is_dir():
                former.rmdir()  # fails if another program has put something there
                rename_new(self.path, target)
            else:
                rename_new(self.path, target)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise DestinationExistsError(
                "was created by another program meanwhile; nothing was replaced",
                path=self.destination,
            ) from error

    def _replace_directory(self, directory: Directory) -> None:
        """Put the new directory in the place of the old, with what does not belong to its kind."""
        target = self._absolute
        if not self.force:
            raise FileExistsError
        check_spared(self._victims(directory), self.spared, self.destination)
        self.path.chmod(stat.S_IMODE(target.stat().st_mode))
        _carry(target, self.path, directory)
        sync_path(self.path)
        former = self.folder / _FORMER
        if exchange(self.path, target):
            self.path.rename(former)
        else:
            target.rename(former)  # a writer that is killed here is made good by the next
            self.path.rename(target)
        _carry(former, target, directory)  # what came while the names were changed

    def _victims(self, directory: Directory) -> list[Path]:
        new = {path.name for path in self.path.iterdir()}
        old = self._absolute.iterdir()
        return [path for path in old if path.name in new or directory.owns(path.name)]

    def _locked(self) -> BaseFileLock | None:
        """Take the lock beside the destination; None where there can be none."""
        from filelock import FileLock, Timeout

        path = self._absolute.parent / _hidden(self._absolute.name, f"{_MARK}.lock")
        if path.is_symlink():
            raise WriteError(
                f"cannot be locked: {path} is a link; remove it", path=self.destination
            )
        lock = FileLock(path, timeout=0, thread_local=False)
        for _ in range(_TRIES):
            try:
                lock.acquire()
            except Timeout:
                if path.exists():
                    message = (
                        f"is being written by {_holder(path)}; wait for its end or name another"
                    )
                    raise WriteError(message, path=self.destination) from None
                # Its holder has just ended, or nothing can be created here.
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return None
                raise
            else:
                with suppress(OSError):
                    path.write_text(f"process {os.getpid()} on {host_name()}\n")
                return lock
        return None

    def _take_up(self) -> None:
        """Make a folder of its own, or take that of a killed writer, and sweep up the others."""
        target, begun = self._absolute, _hidden(self._absolute.name, f"{_MARK}-")
        earlier = [
            path
            for path in (target.parent.iterdir() if self._lock else ())
            if path.name.startswith(begun) and "." not in path.name[len(begun) :]
            if path.is_dir() and not path.is_symlink()
        ]
        for path in earlier:
            if (path / _FORMER).is_dir() and not os.path.lexists(target):
                (path / _FORMER).rename(target)
        usable = [path for path in earlier if os.path.lexists(path / target.name)]
        if self.resume and usable:
            self.folder = max(usable, key=lambda path: path.stat().st_mtime_ns)
            self.left = self.kept = True
        else:
            self.folder = Path(tempfile.mkdtemp(prefix=begun, dir=target.parent))
        for path in earlier:
            if path != self.folder:
                shutil.rmtree(path, ignore_errors=True)

    def _end(self, *, kept: bool) -> None:
        if not kept and hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            with suppress(OSError):  # Windows removes no open file
                Path(self._lock.lock_file).unlink()
            self._lock.release()
        for parent in self._made if not kept else ():
            with suppress(OSError):  # not empty: somebody else uses it
                parent.rmdir()

    def _refusal(self, error: OSError) -> WriteError:
        reason = error.strerror or str(error)
        left = "what is finished is kept" if self.kept else "nothing was left behind"
        return WriteError(f"could not be written ({reason}); {left}", path=self.destination)


@contextmanager
def staged(
    destination: Path,
    *,
    force: bool = False,
    directory: Directory | None = None,
    spared: Iterable[Path] = (),
) -> Generator[Path]:
    """Yield a path to write at; what is there at the end appears at `destination`, or nothing.

    Args:
        destination: file or directory to create; missing parents are made.
        force: replace a regular file, or the parts of a directory that belong to its kind.
        directory: the kind of directory to create; None for a file.
        spared: what the output is made from and must not be replaced by it.

    Raises:
        DestinationExistsError: if there is something at `destination` that is not to be replaced.
        WriteError: if another process is writing it, or the operating system refuses.
    """
    with Output(destination, force=force, directory=directory, spared=spared) as output:
        yield output.path


def _carry(old: Path, new: Path, directory: Directory | None) -> None:
    """Give a new directory a second link to everything of the old that is not replaced."""
    for entry in sorted(old.iterdir()):
        target = new / entry.name
        if directory is not None and directory.owns(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not os.path.lexists(target):
                target.mkdir()
                shutil.copystat(entry, target)
            if target.is_dir() and not target.is_symlink():
                _carry(entry, target, None)
        elif not os.path.lexists(target):
            try:
                os.link(entry, target, follow_symlinks=False)
            except (OSError, NotImplementedError):
                shutil.copy2(entry, target, follow_symlinks=False)


def _made(folder: Path) -> list[Path]:
    """Make a folder and its parents; return those that are new, the innermost first."""
    missing: list[Path] = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return missing


def _hidden(name: str, end: str) -> str:
    """Return a hidden name that belongs to a destination of this name."""
    if len(os.fsencode(name)) > _SHOWN:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = f"{os.fsencode(name)[: _SHOWN // 2].decode(errors='ignore')}.{digest}"
    return f".{name}.{end}"


def _holder(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def _sync_all(path: Path) -> None:
    """Flush a file, or a directory with all that is in it."""
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            _sync_all(inner)
    sync_path(path)


def uninterrupted(work: Callable[[], _Result]) -> _Result:
    """Run to its end what an interrupt must not cut in two; the interrupt is raised after it.

    Signals are raised in the main thread, so the work is done in another.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    task = Task(work)
    gate, ended = _thread.allocate_lock(), _thread.allocate_lock()
    begun = called_off = False

    def run() -> None:
        nonlocal begun
        with gate:
            begun = not called_off
        if begun:
            task.run()
        ended.release()

    late: BaseException | None = None
    ended.acquire()
    try:
        begin_thread(run)
    except RuntimeError:  # the system has no thread left
        return work()
    except BaseException as signal:
        with gate:
            called_off = not begun
        if called_off:
            raise
        late = signal
    while not task.done:
        try:
            ended.acquire(timeout=_MOMENT)
        except BaseException as signal:  # noqa: BLE001  (raised below)
            late = signal
    if late is not None and task.error is None:
        raise late
    return task.result()
