"""How a command speaks: quiet or verbose, in colour or not, and in which shape it answers.

Kept in click's `meta`, which the commands of one call share, so that no function passes it on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from adapterkit_cli.choice import Choice

if TYPE_CHECKING:
    from collections.abc import Callable

    _Option = Callable[[Callable[..., Any]], Callable[..., Any]]

_QUIET, _VERBOSE, _SHAPE = (f"adapterkit.{name}" for name in ("quiet", "verbose", "shape"))
_COLOURS = {"auto": None, "always": True, "never": False}


def _set(key: str) -> Callable[[click.Context, click.Parameter, object], None]:
    def keep(ctx: click.Context, param: click.Parameter, value: object) -> None:
        del param
        if value:
            ctx.meta[key] = value
        if ctx.meta.get(_QUIET) and ctx.meta.get(_VERBOSE):
            raise click.UsageError("--quiet and --verbose exclude each other", ctx)

    return keep


def _colour(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    del param
    if value is not None:
        # Errors are told by the outermost context.
        ctx.color = ctx.find_root().color = _COLOURS[value]


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every command takes."""
    given: tuple[_Option, ...] = (
        click.option(
            "-q",
            "--quiet",
            is_flag=True,
            expose_value=False,
            callback=_set(_QUIET),
            help="No notes and no progress; warnings and errors stay.",
        ),
        click.option(
            "-v",
            "--verbose",
            is_flag=True,
            expose_value=False,
            callback=_set(_VERBOSE),
            help="Whole lists, where they are cut otherwise.",
        ),
        click.option(
            "--color",
            type=Choice(list(_COLOURS)),
            expose_value=False,
            callback=_colour,
            help="Colours: on a terminal (auto), always or never.",
        ),
    )
    for option in reversed(given):
        command = option(command)
    return command


def settle(ctx: click.Context) -> None:
    """Take colours away where the environment asks for it, unless --color was given."""
    if ctx.color is None and (os.environ.get("NO_COLOR") or plain_terminal()):
        ctx.color = False


def plain_terminal() -> bool:
    """Tell whether the terminal shows text and nothing else."""
    return os.environ.get("TERM") == "dumb"


def shape_option(name: str, text: str) -> _Option:
    """Return a flag that chooses the shape of the answer; two of them exclude each other."""

    def choose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        del param
        if not value:
            return
        if other := ctx.meta.get(_SHAPE):
            raise click.UsageError(f"--{other} and --{name} exclude each other", ctx)
        ctx.meta[_SHAPE] = name

    return click.option(f"--{name}", is_flag=True, expose_value=False, callback=choose, help=text)


def shape() -> str:
    """Return how the command answers: `text`, `json`, `jsonl`, `csv`, or another that it has."""
    return _of(_SHAPE) or "text"


def quiet() -> bool:
    """Tell whether notes are left out."""
    return bool(_of(_QUIET))


def verbose() -> bool:
    """Tell whether lists are shown whole."""
    return bool(_of(_VERBOSE))


def _of(key: str) -> Any:
    context = click.get_current_context(silent=True)
    return context.meta.get(key) if context else None
