"""`adapterkit merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit_cli import merge_into, options, rendering
from adapterkit_cli.choice import Choice
from adapterkit_cli.progress import watching

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from click.shell_completion import CompletionItem


def _method_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem | str]:
    """Complete the names of methods."""
    import adapterkit

    del ctx, param
    names = (known.name for known in adapterkit.merge_methods())
    return [name for name in names if name.startswith(incomplete)]


@click.command(
    "merge",
    epilog=options.examples(
        "adapterkit merge style facts --weights 0.7,0.4 -o both",
        "adapterkit merge a b c --method ties --density 0.3 -o merged",
        "adapterkit merge my-adapter --into base/ -o merged-model",
        "adapterkit merge my-adapter --into base.gguf --gguf-type q4_k_m -o merged.gguf",
    ),
)
@click.argument("sources", metavar="SRC...", nargs=-1, type=options.PATH)
@click.option(
    "-o",
    "--output",
    "--outfile",
    "destination",
    metavar="DST",
    type=options.PATH,
    help="File or directory to create; *.gguf means gguf, a directory means peft.",
)
@click.option("--weights", metavar="W,W...", help="One for each SRC; used as they are.")
@click.option(
    "--method",
    metavar="METHOD",
    shell_complete=_method_names,
    help="svd (the weighted sum), cat, slerp, ties, dare, ...; `adapterkit list methods` has all.",
)
@click.option("--rank", metavar="N|auto", help="Rank of every module; by default nothing is lost.")
@click.option("--tol", type=float, metavar="X", help="Largest relative error; gives the rank.")
@click.option("--energy", type=float, metavar="E", help="Smallest share of ‖ΔW‖² to keep.")
@click.option("--density", type=float, metavar="D", help="Share of the entries that a rule keeps.")
@click.option("--param", "params", metavar="NAME=X", multiple=True, help="The method's own number.")
@click.option("--seed", type=int, metavar="N", help="For the random rules; 0 by default.")
@click.option("--space", metavar="S", help="Where: delta, knots, core or core-balanced.")
@click.option("--normalize", is_flag=True, help="Divide the weights by their sum.")
@click.option("--any-base", is_flag=True, help="Merge adapters that name different bases.")
@click.option("--recipe", metavar="FILE", type=options.PATH, help="All of this from a YAML file.")
@options.to
@options.reading
@click.option(
    "--outtype",
    type=Choice(["auto", "f32", "f16", "bf16", "q8_0"], case_sensitive=False),
    help="Stored type; auto, the default, is the widest of each module's sources.",
)
@options.moe_layout
@options.unverified
@options.allow_lossy
@merge_into.options
@options.no_proof
@options.force
@options.as_json
def command(
    sources: tuple[str, ...],
    destination: str | None,
    weights: str | None,
    rank: str | None,
    params: tuple[str, ...],
    recipe: str | None,
    into: str | None,
    *,
    no_proof: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Merge adapters into one, exactly and without the base model.

    SRC may be of any formats, ranks and targets. Weights multiply the updates ΔW; they are never
    normalised unless asked. DST appears only if it holds the merged updates, to the rounding of the
    stored type.

    With --into BASE the updates are added to the weights of a model instead, and DST is that model.
    """
    import adapterkit

    # What is not given is left to the library, and to the recipe.
    arguments = {n: value for n, value in given.items() if value is not None and value is not False}
    arguments |= _numeric(weights, rank, params)
    arguments["proof"] = not no_proof
    if recipe is not None:
        sources, destination = _with_recipe(recipe, sources, destination, arguments)
    if not sources:
        raise click.UsageError("name the adapters to merge, or a --recipe")
    if destination is None:
        raise click.UsageError("name the file or directory to create with -o")
    merge_into.check(into, arguments)
    if into is not None:
        merge_into.run(sources, into, destination, arguments, as_json=as_json)
        return
    with watching("merging"):
        report = adapterkit.merge_files(sources, destination, **arguments)
    rendering.answer(report, as_json=as_json)


def _numeric(weights: str | None, rank: str | None, params: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that click leaves as text."""
    found: dict[str, Any] = {}
    if weights is not None:
        found["weights"] = [_number(part, "--weights") for part in weights.split(",")]
    if rank is not None:
        found["rank"] = int(rank) if rank.isdecimal() else rank
    if params:
        found["params"] = _named(params)
    return found


def _with_recipe(
    recipe: str, sources: Sequence[str], destination: str | None, arguments: dict[str, Any]
) -> tuple[tuple[str, ...], str | None]:
    """Add what a recipe says; what is said twice is an error, whichever was meant."""
    import adapterkit

    read = adapterkit.read_recipe(recipe)
    if sources:
        raise click.UsageError("the recipe names the adapters; leave out SRC")
    said: Mapping[str, Any] = {**read.settings, **read.files}
    out = said.get("out")
    if out is not None and destination is not None:
        raise click.UsageError("the recipe has out; leave out -o")
    from pathlib import Path

    if Path(destination or out or "").absolute() == Path(recipe).absolute():
        raise click.UsageError("the recipe itself would be replaced; name another DST")
    for name, value in said.items():
        if name in arguments:
            raise click.UsageError(f"the recipe has {name}; leave out the option")
        if name != "out":
            arguments[name] = value
    return read.sources, destination or out


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number", param_hint=option) from None


def _named(params: Sequence[str]) -> dict[str, float]:
    named: dict[str, float] = {}
    for param in params:
        name, separator, value = param.partition("=")
        if not separator:
            raise click.BadParameter(f"{param!r} is not NAME=X", param_hint="--param")
        named[name] = _number(value, f"--param {name}")
    return named
