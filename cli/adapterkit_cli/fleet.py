"""`adapterkit fleet`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit_cli import options, rendering
from adapterkit_cli.progress import progress_bar

if TYPE_CHECKING:
    from adapterkit import Copy, FleetReport, LikelyMerge, SimilarityReport

_SHOWN = 20
_WORDS = {"same": "is", "rounded": "is, but for rounding,", "near": "is nearly"}

_sources = click.argument("sources", metavar="SRC...", type=options.PATH, nargs=-1, required=True)
_jobs = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes side by side; by default one for each processor.",
)
_dask = click.option("--dask", metavar="ADDRESS", help="Scheduler of a Dask cluster to run on.")
_base = options.base


@click.group(
    "fleet",
    epilog=options.examples(
        "adapterkit fleet run validate adapters/ -o results/",
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
        "adapterkit fleet run validate adapters/ -o results/",
        "adapterkit fleet run convert list.txt -o gguf/ --base base/ --jobs 4",
    ),
)
@click.argument("action", type=click.Choice(["validate", "audit", "convert", "inspect"]))
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
@_base
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
    "--tries", type=click.IntRange(min=1), default=3, show_default=True, help="Of what fails."
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
            progress=progress,
        )
    written = write_fleet_tables(report, folder)
    if as_json:
        rendering.emit_json(report)
    else:
        rendering.emit(_run_text(report))
        rendering.remark("report", str(written[-1]))
    ctx.exit(report.exit_code)


def _told(action: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return what the action's function takes; what belongs to another action is refused."""
    takes = {
        "validate": {"base", "targets"},
        "convert": {"base", "to", "for_engine", "outtype", "allow_lossy", "unverified"},
    }.get(action, {"base"})
    told = {name: value for name, value in given.items() if value and value != "auto"}
    if others := sorted(told.keys() - takes):
        names = {"targets": "target", "for_engine": "for"}
        option = names.get(others[0], others[0].replace("_", "-"))
        raise click.UsageError(f"--{option} says nothing to {action}")
    if "targets" in told:
        told["targets"] = list(told["targets"])
    return told


def _run_text(report: FleetReport) -> str:
    count = rendering.count(report.adapters, "adapter")
    states = f"{report.done:,} done, {report.refused:,} refused, {report.failed:,} failed"
    lines = [f"{report.action}: {count}, {report.looked_at:,} looked at now: {states}"]
    worst = [row for row in report.rows if row.state != "done" or row.exit_code]
    rows = [(_shown(row.path), row.state, row.headline.split("\n")[0]) for row in worst[:_SHOWN]]
    if rows:
        lines.append(rendering.columns(rows))
    if len(worst) > _SHOWN:
        lines.append(f"and {len(worst) - _SHOWN:,} more in {report.ledger}")
    return "\n".join(lines)


@command.command(
    "similar", epilog=options.examples("adapterkit fleet similar adapters/ -o prints/")
)
@_sources
@_base
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
    base: str | None,
    folder: str | None,
    jobs: int | None,
    dask: str | None,
    *,
    sketch_only: bool,
    no_merges: bool,
    as_json: bool,
) -> None:
    """Find copies across formats, rescaled and near copies, and merges of known adapters."""
    from adapterkit import find_similar

    with progress_bar("fingerprint", unit="adapters") as progress:
        report = find_similar(
            sources,
            base=base,
            folder=folder,
            confirm=not sketch_only,
            merges=not no_merges,
            dask=dask,
            jobs=jobs,
            progress=progress,
        )
    if as_json:
        rendering.emit_json(report)
        return
    rendering.emit(_similar_text(report))
    for names, told in (
        (report.unplaced, "rows in llama.cpp's order; give --base to compare with other formats"),
        (report.partial, "trained tensors beside the updates are not compared"),
    ):
        rendering.remarks("note", (f"{_shown(name)}: {told}" for name in names[:_SHOWN]))
    rendering.remarks("unread", (f"{_shown(path)}: {why}" for path, why in report.unread.items()))


def _shown(path: str) -> str:
    """Return a path as it is called from here, if it lies here."""
    from pathlib import Path

    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _similar_text(report: SimilarityReport) -> str:
    lines = [
        (
            f"{rendering.count(report.adapters, 'adapter')}: {len(report.copies):,} copies in "
            f"{rendering.count(len(report.clusters), 'cluster')}, "
            f"{rendering.count(len(report.merges), 'merge')}"
        )
    ]
    lines += [rendering.printable(_copy_line(copy)) for copy in report.copies]
    lines += [rendering.printable(_merge_line(merge)) for merge in report.merges]
    lines += [rendering.printable(f"{_shown(path)} changes nothing") for path in report.untrained]
    return "\n".join(lines)


def _copy_line(copy: Copy) -> str:
    times = "" if abs(copy.ratio - 1) < 5e-4 else f"{copy.ratio:.4g} times "  # noqa: PLR2004
    apart = rendering.short(copy.distance) + ("" if copy.exact else " by its sketch")
    path, of = _shown(copy.path), _shown(copy.of)
    subject = f"the update of {path}" if copy.partial else path
    other = f"that of {of}" if copy.partial else of
    return f"{subject} {_WORDS[copy.kind]} {times}{other} (distance {apart})"


def _merge_line(merge: LikelyMerge) -> str:
    terms = " + ".join(
        f"{weight:.3g} · {_shown(parent)}"
        for weight, parent in zip(merge.weights, merge.parents, strict=True)
    )
    verb = "is" if merge.exact else "is close to"
    return f"{_shown(merge.path)} {verb} {terms} (residual {rendering.short(merge.residual)})"
