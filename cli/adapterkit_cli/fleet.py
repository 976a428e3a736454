"""`adapterkit fleet`."""

from __future__ import annotations

from typing import Any

import click

from adapterkit_cli import options, rendering
from adapterkit_cli.choice import Choice
from adapterkit_cli.progress import progress_bar

_sources = click.argument("sources", metavar="SRC...", type=options.PATH, nargs=-1, required=True)
_jobs = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes side by side; by default one for each processor.",
)
_dask = click.option("--dask", metavar="ADDRESS", help="Scheduler of a Dask cluster to run on.")


@click.group(
    "fleet",
    epilog=options.examples(
        "adapterkit fleet run validate adapters/ -o results/ --base base/",
        "adapterkit fleet similar adapters/ -o prints/",
    ),
)
def command() -> None:
    """Run over many adapters, or find copies among them.

    SRC is an adapter, a folder that is searched, a .txt file with one SRC in each line, or
    `hub-cache`. Both answer with one JSON object if given --json.
    """


@command.command(
    "run",
    epilog=options.examples(
        "adapterkit fleet run validate adapters/ -o results/ --base base/",
        "adapterkit fleet run convert list.txt -o gguf/ --base base/ --jobs 4",
    ),
)
@click.argument("action", type=Choice(["validate", "audit", "convert", "inspect"]))
@_sources
@click.option(
    "-o",
    "--output",
    "folder",
    metavar="DIR",
    type=options.PATH,
    required=True,
    help="Folder of the ledger and the tables; the same again goes on where it was.",
)
@options.reading
@click.option(
    "--target",
    "targets",
    metavar="ENGINE[@VERSION]",
    multiple=True,
    shell_complete=options.engine_names,
    help="With validate: engine that they are for; may be repeated.",
)
@options.to
@click.option("--for", "for_engine", metavar="ENGINE[@VERSION]", help="With convert: the engine.")
@options.outtype
@options.allow_lossy
@options.unverified
@_jobs
@_dask
@click.option(
    "--tries",
    metavar="N",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Of what fails.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="For each adapter; one that takes longer has failed, and the others go on.",
)
@options.as_json
@click.pass_context
def run(
    ctx: click.Context,
    action: str,
    sources: tuple[str, ...],
    folder: str,
    jobs: int | None,
    dask: str | None,
    tries: int,
    timeout: float | None,
    *,
    as_json: bool,
    **given: Any,
) -> None:
    """Validate, audit, convert or inspect every adapter; kill it at any moment, and run it again.

    What is known stays in DIR/ledger.sqlite; DIR/ACTION.jsonl, .csv and .html show it, the worst
    first. Exit code: the worst of all adapters.
    """
    from adapterkit import run_fleet, write_fleet_tables

    told = _told(action, given)
    with progress_bar(action, unit="adapters") as progress:
        report = run_fleet(
            action,
            sources,
            folder,
            options=told,
            dask=dask,
            jobs=jobs,
            tries=tries,
            timeout=timeout,
            progress=progress,
        )
    written = write_fleet_tables(report, folder)
    rendering.answer(report, as_json=as_json)
    if not as_json:
        rendering.remark("report", str(written[-1]))
    ctx.exit(report.exit_code)


def _told(action: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return what the action's function takes; what belongs to another action is refused."""
    reading = {"base", "dialect", "alpha", "as_format"}
    takes = reading | {
        "validate": {"targets"},
        "convert": {"to", "for_engine", "outtype", "allow_lossy", "unverified"},
    }.get(action, set[str]())
    told = {
        name: value
        for name, value in given.items()
        if value is not None and value is not False and value not in ((), "auto")
    }
    if others := sorted(told.keys() - takes):
        names = {"targets": "target", "for_engine": "for"}
        option = names.get(others[0], others[0].replace("_", "-"))
        raise click.UsageError(f"--{option} says nothing to {action}")
    if "targets" in told:
        told["targets"] = list(told["targets"])
    return told


@command.command(
    "similar", epilog=options.examples("adapterkit fleet similar adapters/ -o prints/")
)
@_sources
@options.reading
@click.option(
    "-o",
    "--output",
    "folder",
    metavar="DIR",
    type=options.PATH,
    help="Folder that keeps the fingerprints: the next time only what is new is read.",
)
@click.option("--sketch-only", is_flag=True, help="Do not confirm copies from the factors.")
@click.option("--no-merges", is_flag=True, help="Do not look for sums of adapters.")
@_jobs
@_dask
@options.as_json
def similar(
    sources: tuple[str, ...],
    folder: str | None,
    jobs: int | None,
    dask: str | None,
    *,
    sketch_only: bool,
    no_merges: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Find copies across formats, rescaled and near copies, and merges of known adapters."""
    from adapterkit import find_similar

    with progress_bar("fingerprint", unit="adapters") as progress:
        report = find_similar(
            sources,
            folder=folder,
            confirm=not sketch_only,
            merges=not no_merges,
            dask=dask,
            jobs=jobs,
            progress=progress,
            **reading,
        )
    rendering.answer(report, as_json=as_json)
