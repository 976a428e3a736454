"""`adapterkit convert`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from adapterkit_cli import answers, manner, options, rendering
from adapterkit_cli.progress import watching

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapterkit import Attempt, ConversionReport

_STREAM = "-"


@click.command(
    "convert",
    epilog=options.examples(
        "adapterkit convert my-adapter -o my-adapter.gguf --base base/",
        "adapterkit convert my-adapter.gguf -o my-adapter --to peft --base base/",
        "adapterkit convert my-adapter -o for-mlx --to mlx --base base/",
        "adapterkit convert my-adapter -o for-sglang --for sglang",
        "adapterkit convert my-dora -o my-lora --base base/ --dora-rank 64 --allow-lossy",
        "adapterkit convert adapters/* -o converted/ --to gguf --base base/ --jobs 4",
        "adapterkit convert my-adapter --to gguf --base base/ -o - | ssh host 'cat > a.gguf'",
    ),
)
@click.argument("sources", metavar="SRC...", type=options.PATH, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    "--outfile",
    "destination",
    metavar="DST",
    type=options.PATH,
    required=True,
    help="File or directory to create; *.gguf means gguf, a directory means peft, - is standard "
    "output. Of several SRC: the directory that each output goes to, under the name of its SRC.",
)
@options.reading
@options.writing
@click.option(
    "--for",
    "for_engine",
    metavar="ENGINE[@VERSION]",
    shell_complete=options.engine_names,
    help="Make the exact changes that an engine needs, one of `adapterkit list engines`.",
)
@click.option(
    "--dora-rank",
    type=click.IntRange(1),
    metavar="N",
    help="With --allow-lossy and the base's weights: make every DoRA the nearest LoRA of this "
    "rank, and print the error of each.",
)
@options.moe_layout
@options.unverified
@options.allow_lossy
@options.jobs
@options.as_results
@click.pass_context
def command(
    ctx: click.Context,
    sources: tuple[str, ...],
    destination: str,
    base: str | None,
    jobs: int | None,
    *,
    no_proof: bool,
    **given: Any,
) -> None:
    """Write an adapter in another format, and prove it equal.

    The proof is read from the written file. DST appears only if every update ΔW in it
    equals that of SRC, to the rounding of the stored type.
    """
    import adapterkit

    given |= {"base": base, "proof": not no_proof}
    if destination == _STREAM:
        _stream(sources, given)
        return
    what = "steps" if len(sources) == 1 else "adapters"
    with watching("converting", what) as progress:
        if len(sources) == 1:
            attempts = adapterkit.for_each(
                adapterkit.convert, sources, progress=progress, destination=destination, **given
            )
        else:
            attempts = adapterkit.convert_all(
                sources, destination, jobs=jobs, progress=progress, **given
            )
    if report := answers.single(attempts):
        rendering.show(report)
        return
    if not answers.emit(attempts):
        _show_all(attempts)
    answers.tell_failures(attempts)
    ctx.exit(answers.exit_code(attempts))


def _stream(sources: Sequence[str], given: dict[str, Any]) -> None:
    """Convert to a file beside, and write its bytes to standard output once it is proven."""
    if len(sources) > 1 or manner.shape() != "text":
        raise click.UsageError("-o - writes the bytes of one file and nothing else")
    if sys.stdout.isatty():
        raise click.UsageError("-o - writes bytes; send them to a file or a pipe")
    if given["to"] is None:
        raise click.UsageError("-o - has no name that says what to write; choose with --to")
    from pathlib import Path
    from tempfile import TemporaryDirectory

    import adapterkit
    from adapterkit.registry import spec

    if spec(given["to"]).files:
        raise click.UsageError(f"{given['to']} is a directory; -o - takes a file format")
    with TemporaryDirectory(prefix="adapterkit-") as folder, watching("converting"):
        target = Path(folder) / "".join(["adapter", *spec(given["to"]).suffixes[:1]])
        report = adapterkit.convert(sources[0], target, **given)
        _copy(target)
    rendering.tell(report)


def _copy(path: Path) -> None:
    out = sys.stdout.buffer
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            out.write(block)
    out.flush()


def _show_all(attempts: Sequence[Attempt[ConversionReport]]) -> None:
    for attempt in attempts:
        if attempt.result is not None:
            rendering.show(attempt.result)
    done = sum(attempt.result is not None for attempt in attempts)
    rendering.emit(f"{done} of {rendering.count(len(attempts), 'adapter')} converted")
