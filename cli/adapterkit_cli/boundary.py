"""The one place where errors become a line on stderr and an exit code."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from adapterkit_cli.signals import Terminated
from adapterkit_cli.streams import discard_stdout

if TYPE_CHECKING:
    from collections.abc import Generator

# What a shell reports for a program that the signal ended: 128 + its number.
INTERRUPTED = 130
BROKEN_PIPE = 141
NOT_FINISHED = 5


class ErrorBoundary(click.Group):
    """Tells users what they can act on in one line; a bug keeps its traceback.

    Click runs completion, then reads the arguments (and prints help), then the command; it has an
    answer of its own to what leaves one of the three, so each of them is fenced.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the program."""
        with told():
            return super().main(*args, **extra)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Read the arguments."""
        with told():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with told():
            return super().invoke(ctx)


@contextmanager
def told() -> Generator[None]:
    """Turn errors into a line on stderr and SystemExit; a bug passes."""
    try:
        yield
    except BrokenPipeError:
        discard_stdout()
        raise SystemExit(BROKEN_PIPE) from None
    except (KeyboardInterrupt, Terminated) as stopped:
        raise _stopped(stopped) from None
    except MemoryError as error:
        report(f"not enough memory{f' ({error})' if str(error) else ''}; {_what_is_left(error)}")
        raise SystemExit(NOT_FINISHED) from None
    except click.ClickException as error:
        vars(error)["message"] = _legible(error.message)
        raise  # click's own way to say what is wrong
    except click.exceptions.Exit:
        raise  # and to end
    except Exception as error:
        if (stopped := _stopping(error)) is not None:
            raise _stopped(stopped) from None
        if (answer := _answer(error)) is None:
            raise
        message, code = answer
        report(message)
        raise SystemExit(code) from None


def _stopped(by: BaseException) -> SystemExit:
    """Say that a signal ended the program."""
    word = "terminated" if isinstance(by, Terminated) else "interrupted"
    report(f"{word}; {_what_is_left(by)}")
    return SystemExit(by.status if isinstance(by, Terminated) else INTERRUPTED)


def _stopping(error: BaseException | None) -> BaseException | None:
    """Return the interrupt that an error is made from: classes that are being made wrap theirs."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, Terminated)):
        error = error.__cause__ or error.__context__
    return error


def _answer(error: Exception) -> tuple[str, int] | None:
    """Return what to say of an error and the exit code; None for a bug."""
    # Not before it is needed: completion and help run without the error tree.
    from adapterkit.errors import exit_code

    if (code := exit_code(error)) is None:
        return None
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror or error}", code
    return str(error), code


def _what_is_left(stopped: BaseException) -> str:
    """Return the first note on what ended the program: a writer that keeps something says so."""
    notes: list[str] = getattr(stopped, "__notes__", [])
    return notes[0] if notes else "nothing was written"


def report(message: str) -> None:
    """Write an error to stderr; what came from a file cannot steer the terminal."""
    click.echo(click.style("Error: ", fg="red", bold=True) + _legible(message), err=True)


def _legible(message: str) -> str:
    # Not before it is needed, as above.
    from adapterkit.errors import legible

    return legible(message)
