"""`adapterkit tinylora`: plan a budget, and project an adapter onto it."""

from __future__ import annotations

from typing import Any

import click

from adapterkit_cli import options, rendering
from adapterkit_cli.choice import Choice
from adapterkit_cli.progress import watching

_MODES = ("none", "all", "tiled", "structured")
_LAST_SEED = 1 << 62

_targets = click.option(
    "--targets",
    metavar="NAME,NAME",
    help="Last name components of the layers to adapt; by default the seven of a decoder.",
)


@click.group(
    "tinylora",
    epilog=options.examples(
        "adapterkit tinylora plan --base base/ --budget 200",
        "adapterkit tinylora project my-adapter --base base/ --size 8 -o tiny",
    ),
)
def command() -> None:
    """Plan a TinyLoRA, or project an adapter onto one.

    Both answer with one JSON object if given --json.
    """


@command.command(
    "plan",
    epilog=options.examples("adapterkit tinylora plan --base base/ --budget 200 --sizes 1,4,13"),
)
@options.required_base
@click.option("--budget", metavar="PARAMS", type=int, required=True, help="Numbers to train.")
@_targets
@click.option(
    "--sizes",
    metavar="U,U",
    default="1,2,4,8",
    show_default=True,
    help="Projection sizes to try, in this order.",
)
@options.as_json
def plan(base: str, budget: int, targets: str | None, sizes: str, *, as_json: bool) -> None:
    """Find the projection size and the ties that train PARAMS numbers.

    One line for each way to tie modules: those of the ANRGUSC pack (tiled, structured, all, none),
    and PEFT's weight_tying. Nothing but headers is read.
    """
    from adapterkit import projection, tinylora

    report = projection.plan(
        base,
        budget=budget,
        targets=_words(targets) or tinylora.TARGETS,
        candidates=[_whole(size) for size in _words(sizes)],
    )
    rendering.answer(report, as_json=as_json)


@command.command(
    "project",
    epilog=options.examples(
        "adapterkit tinylora project my-adapter --base base/ --size 8 -o tiny",
        "adapterkit tinylora project my-adapter --base base/ --size 8 --to tinylora -o t",
    ),
)
@click.argument("source", metavar="SRC", type=options.PATH)
@click.option(
    "-o",
    "--output",
    "--outfile",
    "destination",
    metavar="DST",
    type=options.PATH,
    required=True,
    help="File or directory to create.",
)
@options.required_base
@options.dialect
@options.alpha
@options.as_format
@click.option(
    "--to",
    metavar="FORMAT",
    default="tinylora-pack",
    show_default=True,
    shell_complete=options.format_names,
    help="Format to write.",
)
@click.option(
    "--size",
    "projection_dim",
    metavar="U",
    type=click.IntRange(min=1),
    required=True,
    help="Coefficients of each group of modules.",
)
@click.option(
    "--rank",
    "frozen_rank",
    metavar="R",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Singular triplets kept of each weight.",
)
@click.option(
    "--tie",
    "tie_mode",
    type=Choice(_MODES),
    default="none",
    show_default=True,
    help="Which modules share coefficients.",
)
@click.option(
    "--tie-factor",
    metavar="N",
    type=click.IntRange(min=1),
    help="Modules in a group, for tiled and structured.",
)
@click.option(
    "--numerator",
    "numerator",
    metavar="X",
    type=float,
    default=1.0,
    show_default=True,
    help="Numerator of the scale, X / U.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0, _LAST_SEED),
    default=0,
    help="Seed of the projections.",
)
@_targets
@options.no_proof
@options.allow_lossy
@options.force
@options.as_json
def project(
    source: str,
    destination: str,
    base: str,
    to: str,
    targets: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    numerator: float,
    *,
    no_proof: bool,
    allow_lossy: bool,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write the TinyLoRA that comes nearest to an adapter.

    Lossy: what U numbers in each group of modules cannot reach is gone. The answer says how much
    that is, and how much any TinyLoRA of this rank would lose at least.
    """
    from adapterkit import projection, tinylora

    chosen = tinylora.TinySettings(
        **settings, alpha=numerator, target_modules=_words(targets) or tinylora.TARGETS
    )
    with watching("projecting"):
        written = projection.project_file(
            source,
            destination,
            base=base,
            settings=chosen,
            to=to,
            dialect=dialect,
            alpha=alpha,
            as_format=as_format,
            allow_lossy=allow_lossy,
            force=force,
            proof=not no_proof,
        )
    rendering.answer(written, as_json=as_json)


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no whole number", param_hint="--sizes") from None
