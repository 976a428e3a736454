"""Standard streams that cannot surprise: any text can be printed, and a closed pipe is quiet."""

from __future__ import annotations

import io
import os
import sys


def harden() -> None:
    """Let stdout and stderr escape what their encoding cannot show, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
        # `python -u` writes without a buffer, and drops in silence what a full disk did not take.
        descriptor, encoding = sys.stdout.fileno(), sys.stdout.encoding
        sys.stdout = os.fdopen(
            descriptor, "w", encoding=encoding, errors="backslashreplace", closefd=False
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
