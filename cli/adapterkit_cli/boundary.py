"""The one place where errors become a line on stderr and an exit code."""

from __future__ import annotations

from typing import Any

import click

from adapterkit_cli.rendering import printable
from adapterkit_cli.signals import Terminated
from adapterkit_cli.streams import discard_stdout

# What a shell reports for a program that the signal ended: 128 + its number.
INTERRUPTED = 130
BROKEN_PIPE = 141


class ErrorBoundary(click.Group):
    """Tells users what they can act on in one line; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        # Not before it is needed: completion and help run without the error tree.
        from adapterkit.errors import AdapterKitError

        try:
            return super().invoke(ctx)
        except AdapterKitError as error:
            report(str(error))
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            discard_stdout()
            ctx.exit(BROKEN_PIPE)
        except KeyboardInterrupt:
            report("interrupted; nothing was written")
            ctx.exit(INTERRUPTED)
        except Terminated as error:
            report("terminated; nothing was written")
            ctx.exit(error.status)


def report(message: str) -> None:
    """Write an error to stderr; what came from a file cannot steer the terminal."""
    lines = "\n".join(map(printable, message.split("\n")))
    click.echo(click.style("Error: ", fg="red", bold=True) + lines, err=True)
