"""The program `adapterkit`: its commands by name, each imported when it is asked for."""

from __future__ import annotations

import os
from importlib import import_module

import click

import adapterkit
from adapterkit_cli.boundary import ErrorBoundary
from adapterkit_cli.signals import ended_by_signal, leave_at_once, stopping_cleanly
from adapterkit_cli.streams import harden

# In the order of `--help`; each is the attribute `command` of the module of its name.
COMMANDS = (
    "inspect",
    "convert",
    "validate",
    "diff",
    "verify",
    "stack",
    "doctor",
    "audit",
    "compress",
    "merge",
    "extract",
    "fleet",
    "formats",
    "architectures",
    "targets",
    "tinylora",
)


class Program(ErrorBoundary):
    """The top level: commands whose modules are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of `--help`."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None if there is none of that name."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        return import_module(f"adapterkit_cli.{cmd_name}").command


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit codes: 0 done, 1 findings, 2 usage, 3 unreadable or malformed input, "
        "4 the target cannot hold this adapter, 5 could not be checked or not enough memory."
    ),
)
@click.version_option(adapterkit.__version__, prog_name="adapterkit")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Read, check and convert LoRA adapters, and prove that nothing changed."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def main() -> None:
    """Run the program and exit."""
    harden()
    with stopping_cleanly():
        try:
            cli.main(prog_name="adapterkit")
        except SystemExit as end:
            if ended_by_signal(end.code):
                leave_at_once(int(end.code or 0))
            raise
