"""TinyLoRAs planned for a base, and made of adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from adapterkit import tinylora
from adapterkit.base import BaseModel
from adapterkit.base.fit import check_fit
from adapterkit.certificates import Making
from adapterkit.errors import LossyConversionError
from adapterkit.loading import load, open_model
from adapterkit.model import AdapterTensorSet
from adapterkit.model.beside import left_behind, lost_trained
from adapterkit.notes import Loss
from adapterkit.passes.protocol import Context
from adapterkit.passes.registry import apply
from adapterkit.saving import admitted, destination_format, save
from adapterkit.text import PLAIN, Pen, count, line
from adapterkit.tinylora import PlanReport, ProjectionReport, TinySettings
from adapterkit.tinylora.planner import CANDIDATES
from adapterkit.work import watchable


@dataclass(frozen=True, kw_only=True, repr=False)
class ProjectedFile(ProjectionReport):
    """A projection on disk, what it lost, and what was normalised on the way in.

    Attributes:
        source: path that was read.
        destination: path that was written.
        format: name of the format that was written.
        losses: what was dropped, with `allow_lossy`.
    """

    source: str
    destination: str
    format: str
    losses: tuple[Loss, ...] = ()

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what was written, what is lost, and in which modules most."""
        modules = count(len(self.modules), "module")
        numbers = count(self.parameters, "number")
        lost = super().text(pen)
        return f"{line(self.destination, self.format, modules, numbers)}\n{lost}"


def plan(
    base: BaseModel | Path | str,
    *,
    budget: int,
    targets: Sequence[str] = tinylora.TARGETS,
    candidates: Sequence[int] = CANDIDATES,
) -> PlanReport:
    """Find, for every tie mode, the projection size and ties nearest to a budget.

    Args:
        base: Hugging Face directory, config.json, GGUF file or hub id; only headers are read.
        budget: trained numbers to aim at.
        targets: last name components of the linear layers to adapt.
        candidates: projection sizes to try, in this order.

    Raises:
        UsageError: if the budget or a candidate is less than 1.
        IncompatibleBaseError: if the base has none of the targets.
    """
    report = tinylora.plan(open_model(base), budget=budget, targets=targets, candidates=candidates)
    return replace(report, base=str(base))


@watchable
def project_file(
    source: AdapterTensorSet | Path | str,
    destination: Path | str,
    *,
    base: BaseModel | Path | str,
    settings: TinySettings,
    to: str = "tinylora-pack",
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    allow_lossy: bool = False,
    force: bool = False,
    proof: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ProjectedFile:
    """Write the TinyLoRA that comes nearest to an adapter, proven to be what was computed.

    Args:
        source: adapter of any format that is read, or one in memory.
        destination: file or directory to create.
        base: its base, a Hugging Face directory with weights.
        settings: `projection_dim` is needed; rank 2, `alpha` 1, `seed` 0 and no ties by default.
        to: name of the format.
        dialect: key grammar of a hand-written adapter, where the file cannot tell.
        alpha: scale numerator of the source, where its file does not hold it.
        as_format: name of the format to read it as, where its content does not tell.
        allow_lossy: leave out what has no place in a TinyLoRA; the report lists it.
        force: replace an existing destination.
        proof: whether the file carries what it was made from and what it holds, for `verify`.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        FormatError: if the source is malformed, broken or not finite.
        UnsupportedError: if the base has no weights or is another model, or the adapter holds what
            no TinyLoRA does.
        DestinationExistsError: if the destination exists and `force` is false.
        WriteError: if the output cannot be written.
    """
    del progress  # told by `watchable`
    destination = Path(destination)
    target = destination_format(destination, to, force=force)
    loaded = load(
        source,
        base=base,
        dialect=dialect,
        alpha=alpha,
        as_format=as_format,
        allow_lossy=allow_lossy,
    )
    known = open_model(loaded.base or base)
    check_fit(loaded.adapter, known)
    beyond = tinylora.beyond_reach(loaded.adapter, known, settings)
    lost = [*loaded.losses, *beyond, *lost_trained(loaded.adapter.beside)]
    left = apply(["drop"], loaded.adapter, Context(losses=beyond if allow_lossy else ())).adapter
    if not any(left.pairs()):
        nothing = Loss(
            "nothing-left", target.title, "without it there is no update to come near to"
        )
        raise LossyConversionError([*beyond, nothing], path=destination)
    result, report = tinylora.project(left, base=known, settings=settings)
    options = replace(loaded.options, alpha=None)
    ready = admitted(
        result, target, options, allow_lossy=allow_lossy, into=destination, passed=lost
    )
    made_from = [loaded.source.path] if loaded.source else []
    making = Making("tinylora project", asdict(settings), made_from) if proof else None
    save(ready.adapter, destination, target, loaded.options, force=force, making=making)
    found: dict[str, Any] = {each.name: getattr(report, each.name) for each in fields(report)}
    lying = left_behind(loaded.adapter.beside)
    found["notes"] = (*loaded.told, *lying, *ready.warnings, *report.notes)
    return ProjectedFile(
        **found,
        source=loaded.label,
        destination=str(destination),
        format=target.name,
        losses=ready.losses,
    )
