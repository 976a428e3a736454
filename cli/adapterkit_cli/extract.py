"""`adapterkit extract`."""

from __future__ import annotations

import click

from adapterkit_cli import options, rendering
from adapterkit_cli.choice import Choice
from adapterkit_cli.progress import progress_bar


@click.command(
    "extract",
    epilog=options.examples(
        "adapterkit extract --base base/ --tuned tuned/ -o my-adapter",
        "adapterkit extract --base base.gguf --tuned tuned.gguf -o my-adapter.gguf --rank 16",
    ),
)
@click.option(
    "--base",
    "--base-model-id",
    metavar="BASE",
    type=options.PATH,
    required=True,
    help="The model before: a directory with safetensors, or a GGUF file.",
)
@click.option(
    "--tuned",
    metavar="MODEL",
    type=options.PATH,
    required=True,
    help="The same model after training or merging, of the same kind.",
)
@options.destination
@click.option(
    "--rank",
    metavar="N|auto",
    default="auto",
    show_default=True,
    help="Rank of every module; auto ends where noise begins. Rounding gets no rank.",
)
@click.option("--tol", type=float, metavar="X", help="Largest relative error; gives the rank.")
@click.option("--energy", type=float, metavar="E", help="Smallest share of ‖ΔW‖² to keep.")
@click.option(
    "--max-rank", type=click.IntRange(1), metavar="N", help="Limit of auto; 256 by default."
)
@click.option(
    "--save-rest",
    is_flag=True,
    help="Store norms, biases and the like whole, which are left over otherwise.",
)
@options.to
@click.option(
    "--outtype",
    type=Choice(["auto", "f32", "f16", "bf16", "q8_0"], case_sensitive=False),
    default="auto",
    show_default=True,
    help="Stored type; auto is 16 bits where they add less than 1% to the error, else f32.",
)
@options.moe_layout
@options.unverified
@options.allow_lossy
@click.option("--seed", type=int, metavar="N", default=0, help="Of the random directions.")
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Tensors at a time.")
@options.no_proof
@options.force
@options.as_json
def command(
    base: str,
    tuned: str,
    destination: str,
    rank: str,
    tol: float | None,
    energy: float | None,
    max_rank: int | None,
    to: str | None,
    outtype: str,
    moe_layout: str | None,
    seed: int,
    jobs: int | None,
    *,
    save_rest: bool,
    unverified: bool,
    allow_lossy: bool,
    no_proof: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the adapter between two checkpoints of one model.

    Both are read in blocks of rows, never as a whole. The error of every module is measured
    against the files. What no factors hold is named, and left over unless --save-rest.
    """
    import adapterkit

    with progress_bar("extracting") as progress:
        report = adapterkit.extract(
            base,
            tuned,
            destination,
            rank=int(rank) if rank.isdecimal() else rank,
            tol=tol,
            energy=energy,
            max_rank=max_rank,
            save_rest=save_rest,
            to=to,
            outtype=outtype,
            moe_layout=moe_layout,
            unverified=unverified,
            allow_lossy=allow_lossy,
            seed=seed,
            jobs=jobs,
            force=force,
            proof=not no_proof,
            progress=progress,
        )
    rendering.answer(report, as_json=as_json)
