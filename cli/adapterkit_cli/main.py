"""The program `adapterkit`: its commands by name, each imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

import click

import adapterkit
from adapterkit_cli import manner
from adapterkit_cli.boundary import ErrorBoundary
from adapterkit_cli.runtime import settle_memory, settle_threads
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
    "tinylora",
    "list",
)

# What is named like something of Python.
_MODULES = {"list": "tables"}
# Words that people come with.
_FORMER = {
    "formats": "list",
    "architectures": "list",
    "targets": "list",
    "check": "validate",
    "info": "inspect",
    "resize": "compress",
}


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
        return import_module(f"adapterkit_cli.{_MODULES.get(cmd_name, cmd_name)}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the one that is alike."""
        name = args[0]
        if name in COMMANDS or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        from difflib import get_close_matches

        close = get_close_matches(_FORMER.get(name, name), COMMANDS)
        told = f"Did you mean {' or '.join(close)}?" if close else "adapterkit --help lists all."
        raise click.UsageError(f"No such command '{name}'. {told}", ctx)


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "\b\nExamples:\n"
        "  adapterkit inspect my-adapter\n"
        "  adapterkit convert my-adapter -o my-adapter.gguf --base base/\n"
        "  adapterkit validate my-adapter --base base/ --target vllm\n\n"
        "Exit codes: 0 done, 1 findings, 2 usage, 3 unreadable or malformed input, "
        "4 the target cannot hold this adapter, 5 could not be checked or not enough memory."
    ),
)
@click.version_option(adapterkit.__version__, prog_name="adapterkit")
@manner.options
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Read, check and convert LoRA adapters, and prove that nothing changed."""
    manner.settle(ctx)
    settle_threads()
    settle_memory(ctx.invoked_subcommand)


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
