"""Every exception adapterkit raises, and the exit code the command line gives it.

A path and a tensor or key travel with each, so that a message names them:

    AdapterKitError                 1  base; catch this
      WriteError                    1  the output could not be written (disk full, no permission)
        DestinationExistsError         what is there is not to be replaced, or not without `force`
      UsageError                    2  arguments that contradict each other
      FormatError                   3  the bytes are not what the format says
        NotFoundError                  no file, or no adapter, at the path
        UnknownFormatError             no format recognises the path
        TruncatedFileError             a length points past the end of the file
        UnsafePickleError              a pickle names something outside the allow-list
      UnsupportedError              4  a fine adapter that the target cannot hold
        LossyConversionError           carries every loss, not the first
        UnknownArchitectureError       no table for this model family
        BaseRequiredError              the answer depends on a base model that was not given
        IncompatibleBaseError          the adapter does not fit this base
        ProofError                     the written file does not hold the same update
      UncheckableError              5  nothing is known to be wrong, but it could not be looked at

All of them pickle and copy whole, whatever their arguments are, those of plugins too. The program
gives 5 to MemoryError as well: nothing is known to be wrong, and it could not be finished.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adapterkit.notes import Loss

# What every entry of a list in a message begins with.
_ITEM = "\n  "
# What the operating system has against writing only.
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class AdapterKitError(Exception):
    """Something a caller may want to handle; the message says what to do next.

    Attributes:
        path: the file or directory concerned, if any.
        where: the tensor, key or module concerned, if any.
        needs: the option that would settle it, such as `alpha`; empty without one.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        where: str | None = None,
        needs: str = "",
    ) -> None:
        self.message = legible(message)
        self.needs = needs
        self.path = path
        self.where = where
        named = [_on_one_line(str(part)) for part in (path, where) if part]
        super().__init__(": ".join([*named, self.message] if message else named))

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as text and attributes: Python would call the class with the text alone."""
        return _restored, (type(self), self.args), self.__dict__


def legible(message: str) -> str:
    """Return a message whose lines are its own: names in it can neither end one nor steer.

    What is listed begins on a new line, with two blanks.
    """
    return _ITEM.join(map(_on_one_line, message.split(_ITEM)))


def _on_one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _restored(kind: type[AdapterKitError], arguments: tuple[Any, ...]) -> AdapterKitError:
    """Make an error without its constructor; pickle then sets the attributes."""
    return kind.__new__(kind, *arguments)


def exit_code(error: BaseException) -> int | None:
    """Return the code that the command line gives an error; None for a bug."""
    if isinstance(error, AdapterKitError):
        return error.exit_code
    if isinstance(error, MemoryError):
        return UncheckableError.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        writing = error.errno in _OF_WRITING
        return WriteError.exit_code if writing else FormatError.exit_code
    return None


class WriteError(AdapterKitError):
    """The output could not be written; nothing was left behind."""


class DestinationExistsError(WriteError):
    """There is something at the destination that is not to be replaced, or not unasked."""


class UsageError(AdapterKitError):
    """Arguments that contradict each other or name something unknown."""

    exit_code = 2


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error of a name that there is not, with what was probably meant, and all."""
    from difflib import get_close_matches

    every = list(known)
    close = get_close_matches(name.lower(), every, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return UsageError(f"unknown {what} {name!r}; {meant}known: {', '.join(every)}")


class FormatError(AdapterKitError):
    """The bytes are not what their format says."""

    exit_code = 3


class NotFoundError(FormatError):
    """There is no file, or no adapter, at the path."""


class UnknownFormatError(FormatError):
    """No format recognises the path."""


class TruncatedFileError(FormatError):
    """A length points past the end of the file."""


class UnsafePickleError(FormatError):
    """A pickle asks for something outside the allow-list; nothing was executed."""


class UnsupportedError(AdapterKitError):
    """A fine adapter that the target cannot hold."""

    exit_code = 4


class LossyConversionError(UnsupportedError):
    """The target would lose parts of the adapter; `losses` lists all of them."""

    def __init__(self, losses: Iterable[Loss], *, path: Path | str | None = None) -> None:
        self.losses = tuple(losses)
        lines = [_on_one_line(f"{loss.subject}: {loss.message}") for loss in self.losses]
        count = len(lines)
        head = f"cannot be written without loss ({count} reason{'s' if count != 1 else ''})"
        super().__init__(_ITEM.join([head, *lines]), path=path)


class UnknownArchitectureError(UnsupportedError):
    """No table describes this model family."""


class BaseRequiredError(UnsupportedError):
    """The answer depends on the base model, and none was given or found."""


class IncompatibleBaseError(UnsupportedError):
    """The adapter does not fit this base model."""


class ProofError(UnsupportedError):
    """The written file does not hold the same update; it was removed."""


class UncheckableError(AdapterKitError):
    """Nothing is known to be wrong, but it could not be looked at."""

    exit_code = 5
