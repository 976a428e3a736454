"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit_cli import manner
from adapterkit_cli.choice import Choice

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.shell_completion import CompletionItem

    _Option = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Path(click.Path):
    """A path that names something: an empty one would be the current folder.

    All else is not checked here: a missing file is an error of the input, not of the usage, and
    what looks like a relative path may be a hub id.
    """

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if not str(value).strip():
            self.fail("is empty; is a variable of the shell not set?", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path()


def _all(*given: _Option) -> _Option:
    """Return several options as one decorator, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


as_json = _all(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."), manner.options
)
jobs = click.option(
    "--jobs", type=click.IntRange(1), metavar="N", help="How many at a time; up to four by default."
)
# What commands answer with that take any number of adapters.
as_results = _all(
    manner.shape_option("json", 'Print one JSON object, {"schema", "results"}.'),
    manner.shape_option("jsonl", "Print one JSON object a line, for each SRC."),
    manner.shape_option("csv", "Print CSV, one row for each SRC."),
    manner.options,
)


def examples(*lines: str) -> str:
    """Return the end of a help text: commands to copy."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def engine_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem | str]:
    """Complete the names of engines."""
    from adapterkit import target_names

    del ctx, param
    return [name for name in target_names() if name.startswith(incomplete)]


def type_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem | str]:
    """Complete the types and mixtures that a GGUF base can be stored as."""
    from adapterkit.architectures.mixtures import mixtures

    del ctx, param
    known = ("keep", "f32", "f16", "bf16", "q8_0", *mixtures())
    return [name for name in known if name.startswith(incomplete)]


def format_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem | str]:
    """Complete the names of formats that can be written."""
    from adapterkit.registry import formats

    del ctx, param
    return [f.name for f in formats() if f.writes and f.name.startswith(incomplete)]


def readable_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem | str]:
    """Complete the names of formats that can be read."""
    from adapterkit.registry import formats

    del ctx, param
    return [f.name for f in formats() if f.reads and f.name.startswith(incomplete)]


def dialect_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem | str]:
    """Complete the names of dialects; a file is one too."""
    from click.shell_completion import CompletionItem

    from adapterkit.formats.handwritten.dialects.loading import names

    del ctx, param
    found: list[CompletionItem | str] = [n for n in names() if n.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def code_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem | str]:
    """Complete the codes of findings, with what each is."""
    from click.shell_completion import CompletionItem

    from adapterkit import explanations

    del ctx, param
    known = explanations()
    return [
        CompletionItem(c, help=known[c].title) for c in known if c.startswith(incomplete.upper())
    ]


dialect = click.option(
    "--dialect",
    metavar="NAME|FILE",
    shell_complete=dialect_names,
    help="Key grammar of a hand-written adapter, if the file cannot tell.",
)
alpha = click.option(
    "--alpha", type=float, metavar="X", help="Scale numerator, if the file does not hold it."
)
as_format = click.option(
    "--from",
    "as_format",
    metavar="FORMAT",
    shell_complete=readable_names,
    help="Format to read SRC as, if its content does not tell.",
)
_BASE_HELP = "Base model: directory, config.json, GGUF file or cached hub id."
base = click.option("--base", "--base-model-id", metavar="BASE", type=PATH, help=_BASE_HELP)
required_base = click.option(
    "--base", "--base-model-id", metavar="BASE", type=PATH, required=True, help=_BASE_HELP
)
# What every command takes that reads an adapter, so that any message may advise it.
reading = _all(base, dialect, alpha, as_format)
# What every command takes that writes an adapter; below the functions that complete its values.
destination = click.option(
    "-o",
    "--output",
    "--outfile",
    "destination",
    metavar="DST",
    type=PATH,
    required=True,
    help="File or directory to create; *.gguf means gguf, a directory means peft.",
)
to = click.option(
    "--to",
    metavar="FORMAT",
    shell_complete=format_names,
    help="Format to write, one of `adapterkit list formats`.",
)
outtype = click.option(
    "--outtype",
    type=Choice(["auto", "f32", "f16", "bf16", "q8_0"], case_sensitive=False),
    default="auto",
    show_default=True,
    help="Stored type of the factors; auto keeps each one's.",
)
moe_layout = click.option(
    "--moe-layout", metavar="LAYOUT", help="Spelling of experts: `experts` or `fused`."
)
unverified = click.option(
    "--unverified", is_flag=True, help="Allow model families without an engine test."
)
allow_lossy = click.option(
    "--allow-lossy", is_flag=True, help="Drop what the target cannot hold, and list it."
)
no_proof = click.option(
    "--no-proof", is_flag=True, help="Do not write a proof into DST for `verify`."
)
force = click.option("--force", is_flag=True, help="Replace what is at the destination.")
html = click.option(
    "--html", metavar="FILE", type=PATH, help="Write the report as one self-contained page too."
)
# What every command takes that writes an adapter in a format of choice.
writing = _all(to, outtype, no_proof, force)


def check_page(html: str | None, *, force: bool) -> None:
    """Refuse a page that could not be written, before work is done for it."""
    if html is not None:
        from adapterkit.page import check_page

        check_page(html, force=force)
