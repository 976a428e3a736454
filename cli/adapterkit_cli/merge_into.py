"""`adapterkit merge --into`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit_cli import options as shared
from adapterkit_cli import rendering
from adapterkit_cli.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from adapterkit import MergeIntoReport

# Below this the error of the stored change says nothing.
_EXACT = 5e-4
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
            type=click.Choice(["f32", "f16", "bf16"]),
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
            type=click.Choice(["nearest", "shaped"]),
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
    if as_json:
        rendering.emit_json(report)
        return
    rendering.emit(_text(report))
    rendering.remarks("warning", report.warnings)
    rendering.remarks("note", report.notes)


def _text(report: MergeIntoReport) -> str:
    facts = [
        rendering.printable(report.destination),
        report.format,
        f"{rendering.count(len(report.tensors), 'tensor')} changed",
        *([f"{report.decoded:,} decoded"] if report.decoded else []),
        f"{report.untouched:,} unchanged",
        rendering.size(report.bytes),
    ]
    return "\n".join(["  ".join(facts), _update(report), *_rounding(report)])


def _rounding(report: MergeIntoReport) -> list[str]:
    """Return what shaped rounding did, beside what nearest would have done."""
    from statistics import median

    shaped = [(t, t.nearest) for t in report.tensors if t.nearest is not None]
    if not shaped:
        return []
    pairs = {
        "direction error": [(t.direction_error or 0.0, n.direction_error) for t, n in shaped],
        "survival": [(t.survival or 0.0, n.survival) for t, n in shaped],
        "noise": [(t.noise or 0.0, n.noise) for t, n in shaped],
    }
    shown = [
        f"{name} {median(a for a, _ in each):.0%} ({median(b for _, b in each):.0%})"
        for name, each in pairs.items()
    ]
    meaning = (
        "the first is the error that the model sees where the adapter listens; the last, over all "
        "inputs alike, grows in exchange"
    )
    return [
        f"shaped rounding, medians beside nearest's: {', '.join(shown)}",
        meaning,
    ]


def _update(report: MergeIntoReport) -> str:
    norms = [t.relative_norm for t in report.tensors if t.relative_norm is not None]
    low, high = (rendering.short(f(norms)) if norms else "-" for f in (min, max))
    size = low if low == high else f"{low} to {high}"
    if report.min_survival is None:
        return f"‖ΔW‖/‖W‖ {size}"
    worst = next(t for t in report.tensors if t.survival == report.min_survival)
    share = f"{min(max(report.min_survival, 0.0), 1.0):.1%}"
    where = "" if share == "100.0%" else f" ({rendering.printable(worst.tensor)})"
    kept = f"at least {share} of the update is left after rounding{where}"
    return f"‖ΔW‖/‖W‖ {size}; {kept}{_noise(report)}"


def _noise(report: MergeIntoReport) -> str:
    """Return what the stored change is off by, where rounding is to nearest."""
    found = [(t.noise, t.tensor) for t in report.tensors if t.noise and t.nearest is None]
    if not found:
        return ""
    noise, tensor = max(found)
    if noise < _EXACT:
        return f"; the change stored is within {_EXACT:.2%} of it"
    share = f"{noise:.1%}" if noise < 1 else f"{noise:.0%}"
    return f"; the change stored is off by up to {share} of it ({rendering.printable(tensor)})"
