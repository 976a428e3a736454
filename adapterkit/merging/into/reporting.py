"""What a merge into a base says at its end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.keys import Role
from adapterkit.merging.into.report import MOST_ERROR, MergeIntoReport, TensorReport

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapterkit.base.model import BaseModel
    from adapterkit.base.quantised import DecodedBase
    from adapterkit.merging.planning import Source

_SURVIVAL = 0.95
# Errors of rounding, as a share of ‖ΔW‖, above which they are larger than the update.
_NOISE = 1.0


def reported(
    sources: Sequence[Source],
    base: BaseModel,
    destination: Path,
    tensors: Sequence[TensorReport],
    notes: Sequence[str],
) -> MergeIntoReport:
    files = destination.rglob("*") if destination.is_dir() else [destination]
    survivals = [t.survival for t in tensors if t.survival is not None]
    return MergeIntoReport(
        sources=tuple(source.label for source in sources),
        weights=tuple(source.weight for source in sources),
        base=str(base.path),
        destination=str(destination),
        format="gguf" if base.kind == "gguf" else "safetensors",
        tensors=tuple(tensors),
        untouched=len(base.tensors.keys() - {tensor.tensor for tensor in tensors}),
        bytes=sum(file.stat().st_size for file in files if file.is_file()),
        min_survival=min(survivals, default=None),
        max_noise=max((t.noise for t in tensors if t.noise is not None), default=None),
        warnings=_warnings(tensors),
        notes=tuple(notes),
    )


def with_decoded(report: MergeIntoReport, decoded: DecodedBase) -> MergeIntoReport:
    """Say what was decoded, and what is no longer there."""
    changed = {tensor.tensor for tensor in report.tensors}
    merely = [name for name in decoded.stored if name not in changed]
    notes: list[str] = []
    if decoded.left_out:
        kinds = Counter(name.rpartition(".")[2] for name in decoded.left_out)
        shown = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        notes = [f"left out, being about activations or the cache in 8 bits: {shown}"]
    return replace(
        report,
        untouched=report.untouched - len(merely),
        decoded=len(merely),
        left_out=decoded.left_out,
        notes=(*report.notes, *notes),
    )


def order_counts(sources: Sequence[Source]) -> list[str]:
    """Say that the order counts, where it does."""
    held = {key.role for source in sources for key in source.adapter.tensors}
    if len(sources) == 1 or not held & {Role.MAGNITUDE, Role.COLUMN_MAGNITUDE}:
        return []
    return ["DoRA scales what the adapters before it have made, as in PEFT: their order counts"]


def _warnings(tensors: Sequence[TensorReport]) -> tuple[str, ...]:
    # Shaped rounding trades survival for errors elsewhere; of it, the error along ΔW tells.
    low = [
        t
        for t in tensors
        if t.survival is not None
        and t.survival < _SURVIVAL
        and (t.direction_error is None or t.direction_error > MOST_ERROR)
    ]
    found: list[str] = []
    if low:
        worst = min(low, key=lambda t: t.survival or 0.0)
        found.append(
            f"less than {_SURVIVAL:.0%} of the update is left after rounding in {len(low)} of "
            f"{len(tensors)} tensors, least in {worst.tensor} "
            f"({max(worst.survival or 0.0, 0.0):.0%}); store a wider type"
        )
    # Of shaped rounding the error over all inputs alike is the price, not the fault.
    loud = [(t.noise, t) for t in tensors if t.nearest is None and (t.noise or 0.0) > _NOISE]
    if loud:
        noise, worst = max(loud, key=lambda pair: pair[0] or 0.0)
        found.append(
            f"rounding changes {len(loud)} of {len(tensors)} tensors by more than the update does, "
            f"most {worst.tensor} ({noise or 0.0:.3g} times ‖ΔW‖ as {worst.dtype}): what is "
            "left of the update stands in noise of that size; store a wider type"
        )
    return tuple(found)
