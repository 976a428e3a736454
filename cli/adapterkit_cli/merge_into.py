"""`adapterkit merge --into`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit_cli import options as shared
from adapterkit_cli import rendering
from adapterkit_cli.choice import Choice
from adapterkit_cli.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_OWN = (
    "dtype",
    "gguf_type",
    "rounding",
    "calibrate",
    "tied",
    "dequantize",
    "allow_requantise",
    "allow_weak",
    "resume",
    "jobs",
)
_BOTH = (
    "weights",
    "method",
    "density",
    "params",
    "seed",
    "normalize",
    "dialect",
    "alpha",
    "as_format",
    "allow_lossy",
    "force",
    "proof",
)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a merge into a base."""
    given = (
        click.option(
            "--into",
            metavar="BASE",
            type=shared.PATH,
            help="Add the updates to this model: a directory gives a directory, a GGUF a GGUF.",
        ),
        click.option(
            "--dtype",
            type=Choice(["f32", "f16", "bf16"]),
            help="With --into a directory: store the whole model as this type.",
        ),
        click.option(
            "--gguf-type",
            metavar="T",
            shell_complete=shared.type_names,
            help="With --into a GGUF: keep, f32, f16, bf16 or q8_0 for what changes; by default "
            "all other types become q8_0. A mixture, such as q4_k_m, quantises the whole model.",
        ),
        click.option(
            "--rounding",
            type=Choice(["nearest", "shaped"]),
            help="How low-bit types are rounded: shaped, the default of keep, keeps errors away "
            "from what the adapter listens to.",
        ),
        click.option(
            "--calibrate",
            metavar="TEXT|IMATRIX",
            type=shared.PATH,
            help="With shaped rounding: a text like those that the model will see (needs "
            "transformers), or llama.cpp's imatrix.gguf.",
        ),
        click.option(
            "--tied",
            metavar="HOW",
            help="Where embedding and output are one table: change both (shared), or untie them.",
        ),
        click.option(
            "--dequantize",
            is_flag=True,
            help="Where the base is stored as fp8 or MXFP4: store the whole result in 16 bits.",
        ),
        click.option(
            "--allow-requantise",
            is_flag=True,
            help="Quantise a base to a mixture that is quantised already, with the errors of both.",
        ),
        click.option(
            "--allow-weak",
            is_flag=True,
            help="Keep a GGUF type that most of the update does not survive.",
        ),
        click.option("--resume", is_flag=True, help="Go on where a killed merge ended."),
        click.option("--jobs", type=click.IntRange(1), metavar="N", help="Tensors at a time."),
    )
    for option in reversed(given):
        command = option(command)
    return command


def check(into: str | None, arguments: Mapping[str, Any]) -> None:
    """Refuse options of the other kind of merge."""
    if into is None:
        wrong = [name for name in _OWN if name in arguments]
        reason = "goes with --into"
    else:
        wrong = [name for name in arguments if name not in {*_OWN, *_BOTH}]
        reason = "does not go with --into, which adds updates to the weights and keeps all of them"
    if wrong:
        names = {"params": "--param", "as_format": "--from"}
        raise click.UsageError(f"{names.get(wrong[0], '--' + wrong[0].replace('_', '-'))} {reason}")


def run(
    sources: Sequence[str],
    base: str,
    destination: str,
    arguments: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    """Merge, and print what was done."""
    import adapterkit

    with progress_bar("merging") as progress:
        report = adapterkit.merge_into(sources, base, destination, progress=progress, **arguments)
    rendering.answer(report, as_json=as_json)
