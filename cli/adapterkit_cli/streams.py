"""Standard streams that cannot surprise: any text can be printed, and what is lost is an error."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Output(io.RawIOBase):
    """Standard output whose failures say so: the operating system names no file for them."""

    def __init__(self, stream: io.RawIOBase) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, data: Buffer, /) -> int | None:
        try:
            return self._stream.write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            # Not before it is needed: completion and help run without the error tree.
            from adapterkit.errors import WriteError

            discard_stdout()
            reason = error.strerror or str(error)
            raise WriteError(f"could not be written ({reason})", path="standard output") from error


def harden() -> None:
    """Let stdout and stderr escape what their encoding cannot show, and stdout name its failures.

    `python -u` writes without a buffer, and drops in silence what a full disk did not take: stdout
    always gets one, which click empties after each text.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    buffer: Any = getattr(sys.stdout, "buffer", None)
    if buffer is not None:
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output(getattr(buffer, "raw", buffer))),
            encoding=sys.stdout.encoding,
            errors="backslashreplace",
            line_buffering=sys.stdout.isatty(),
        )


def discard_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's last flush does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError):  # replaced by something without a descriptor
        pass
    finally:
        os.close(nowhere)
