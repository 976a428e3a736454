"""`adapterkit compress`."""

from __future__ import annotations

import math

import click

from adapterkit_cli import options, rendering
from adapterkit_cli.progress import watching


@click.command(
    "compress",
    epilog=options.examples(
        "adapterkit compress my-adapter -o smaller --tol 0.1",
        "adapterkit compress my-adapter -o smaller --rank 8",
        "adapterkit compress my-adapter -o smaller.gguf --budget 2000000 --base base/",
    ),
)
@click.argument("source", metavar="SRC", type=options.PATH)
@options.destination
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Largest rank of a module.")
@click.option(
    "--tol",
    type=click.FloatRange(min=0, max=1, max_open=True),
    metavar="X",
    help="Largest relative error of the whole update; 0 removes only what is no part of it.",
)
@click.option(
    "--energy",
    type=click.FloatRange(min=0, max=1, min_open=True),
    metavar="E",
    help="Smallest share of ‖ΔW‖² to keep, of the whole update: --tol √(1 - E).",
)
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    metavar="PARAMS",
    help="Largest number of parameters of all factors.",
)
@click.option("--sv-ratio", type=float, metavar="T", help="For each module: keep σ > σ₁ / T.")
@click.option("--sv-cumulative", type=float, metavar="T", help="Keep the share T of Σσ.")
@click.option("--sv-fro", type=float, metavar="T", help="Keep the share T of the Frobenius norm.")
@options.reading
@options.writing
@options.unverified
@options.allow_lossy
@options.as_json
def command(
    source: str,
    destination: str,
    rank: int | None,
    tol: float | None,
    energy: float | None,
    budget: int | None,
    to: str | None,
    base: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    outtype: str,
    *,
    no_proof: bool,
    unverified: bool,
    allow_lossy: bool,
    force: bool,
    as_json: bool,
    **thresholds: float | None,
) -> None:
    """Write an adapter with smaller ranks, at a stated cost.

    Each module is cut to the best factors of its new rank. --tol and --budget choose ranks for all
    modules together; --sv-ratio, --sv-cumulative and --sv-fro for each alone, as kohya's
    resize_lora does, with --rank as a cap.
    """
    policies = {name: value for name, value in thresholds.items() if value is not None}
    given = (("--tol", tol), ("--energy", energy), ("--budget", budget))
    wishes = [name for name, value in given if value is not None]
    wishes += ["--" + name.replace("_", "-") for name in policies]
    if rank is None and not wishes:
        raise click.UsageError("give one of --rank, --tol, --energy, --budget, ... to cut by")
    if len(wishes) > 1:
        raise click.UsageError(f"{' and '.join(wishes)} exclude each other")
    policy, threshold = next(iter(policies.items()), (None, None))
    from adapterkit import compress_file

    with watching("compressing"):
        written = compress_file(
            source,
            destination,
            rank=rank,
            tol=tol if energy is None else math.sqrt(1 - energy),
            budget=budget,
            policy=policy,
            threshold=threshold,
            to=to,
            base=base,
            dialect=dialect,
            alpha=alpha,
            as_format=as_format,
            outtype=outtype,
            unverified=unverified,
            allow_lossy=allow_lossy,
            force=force,
            proof=not no_proof,
        )
    rendering.answer(written, as_json=as_json)
