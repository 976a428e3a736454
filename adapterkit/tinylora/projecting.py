"""`adapterkit tinylora project`: the pack's TinyLoRA that comes nearest to any adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.base.places import Places
from adapterkit.errors import FormatError, LossyConversionError, UnsupportedError
from adapterkit.keys import FACTORS
from adapterkit.lowrank.differences import finite
from adapterkit.notes import Loss, Provenance, first_and_more
from adapterkit.text import PLAIN, Pen, Shown, columns, short
from adapterkit.tinylora.adapter import TinyAdapter, neutral
from adapterkit.tinylora.fitting import Fit, ModuleResidual, fit
from adapterkit.tinylora.pack import doubts, grouping, pack_targets, rebuild
from adapterkit.tinylora.settings import TinySettings
from adapterkit.tinylora.targets import require_weights
from adapterkit.tinylora.writing import NO_PLACE

if TYPE_CHECKING:
    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet


# What would vanish: coefficients say how much of a weight's update there is, and nothing else.
# Modules that are listed.
_SHOWN = 10
_NO_UPDATE = {
    "alora_invocation_tokens": "is active after its invocation tokens only, and a TinyLoRA acts on "
    "every token",
    "layer_replication": "replicates layers; build that base first",
    "init_lora_weights": "is for a base that its initialisation changed; convert it with --base",
    "engine_layout": "is in llama.cpp's layout, which this base does not undo",
}
_NO_TARGET = (
    "is no target module; name its last component among --targets, if it is a linear layer, or "
    "leave it out with --allow-lossy"
)
_NO_WEIGHT = (
    "has no plain weight in this base; give the base that is not quantised, or leave it out with "
    "--allow-lossy"
)
_WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True, repr=False)
class ProjectionReport(Shown):
    """What was projected, and what is lost.

    Attributes:
        settings: how the TinyLoRA was set up.
        groups: vectors.
        parameters: numbers that are left of the adapter.
        residual: ‖ΔW' - ΔW‖ / ‖ΔW‖ over all modules; no other coefficients come nearer.
        out_of_reach: the least that any matrices between the same singular vectors could leave.
        modules: both numbers for each module.
        notes: what is to be known of the frozen parts.
    """

    settings: TinySettings
    groups: int
    parameters: int
    residual: float
    out_of_reach: float
    modules: tuple[ModuleResidual, ...]
    notes: tuple[str, ...]
    _entries = "modules"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what is lost, and in which modules most."""
        least = f"no TinyLoRA of rank {self.settings.frozen_rank} loses less than"
        lost = f"lost {short(self.residual)} of the update; {least} {short(self.out_of_reach)}"
        worst = sorted(self.modules, key=lambda each: -(each.residual or 0.0))
        cells = [
            (each.module, short(each.norm), short(each.residual), short(each.out_of_reach))
            for each in pen.shown(worst, _SHOWN)
        ]
        lines = [lost, "", columns(cells, header=("module", "norm", "lost", "at least"), pen=pen)]
        if more := len(worst) - len(cells):
            lines.append(f"and {more:,} more; --json lists all")
        return "\n".join(lines)


def project(
    adapter: AdapterTensorSet, *, base: BaseModel, settings: TinySettings
) -> tuple[AdapterTensorSet, ProjectionReport]:
    """Return the TinyLoRA nearest to an adapter, by least squares for each tie group.

    Args:
        adapter: any update of linear layers that are among the targets.
        base: its base, a Hugging Face directory with weights.
        settings: `projection_dim` is needed; rank 2, `alpha` 1, `seed` 0 and no ties by default.

    Returns:
        The projection as an adapter, to be written in any form, and what it lost: the source is not
        what it holds.

    Raises:
        BaseRequiredError: if the base has no Hugging Face weights.
        LossyConversionError: if the adapter changes something that is no target.
        UnsupportedError: if it is no update that always acts.
        FormatError: if it is not finite.
        UncheckableError: if torch is not installed.
    """
    path = adapter.provenance.path if adapter.provenance else Path()
    settings = _completed(settings, path)
    known = require_weights(base, path=path)
    for trait, reason in _NO_UPDATE.items():
        if trait in adapter.settings:
            raise UnsupportedError(f"{reason} ({trait})", path=path)
    if losses := beyond_reach(adapter, known, settings):
        raise LossyConversionError(losses, path=path)
    if broken := next((pair for pair in adapter.pairs() if not finite(pair)), None):
        raise FormatError(
            "holds NaN or infinity; this adapter is broken", path=path, where=broken.module
        )
    adapter = adapter.renamed(_stored(adapter, known))
    groups = grouping(pack_targets(known, settings), settings)
    # Nothing was trained with these factors, so they may be the ones that every machine finds.
    rebuilt = rebuild(known, settings, groups, path=path, precision="float64")
    modules = tuple(each.module for each in rebuilt)
    found = fit(adapter, modules)
    tiny = TinyAdapter(modules=modules, vectors=found.vectors, form="pack", settings=settings)
    # Signs are no doubt here: the witness that is written settles them.
    notes = tuple(doubts(rebuilt, found.vectors, witnessed=True))
    result = neutral(tiny, base=adapter.base, provenance=Provenance(path, "tinylora", notes))
    return result, _report(tiny, found, settings, notes)


def _completed(settings: TinySettings, path: Path) -> TinySettings:
    usual = {"alpha": 1.0, "seed": 0, "tie_mode": "none", "frozen_rank": 2}
    missing = {name: value for name, value in usual.items() if getattr(settings, name) is None}
    settings.require(("projection_dim",), path=path)
    return replace(settings, **missing)


def _report(
    tiny: TinyAdapter, found: Fit, settings: TinySettings, notes: tuple[str, ...]
) -> ProjectionReport:
    return ProjectionReport(
        settings=settings,
        groups=len(found.vectors),
        parameters=tiny.coefficients,
        residual=found.residual,
        out_of_reach=found.out_of_reach,
        modules=found.modules,
        notes=notes,
    )


def beyond_reach(
    adapter: AdapterTensorSet, base: BaseModel, settings: TinySettings
) -> tuple[Loss, ...]:
    """List what no TinyLoRA of these settings can come near to: no target, or no update."""
    known = set(pack_targets(base, settings))
    stored = _stored(adapter, base)
    keys = [key for key in adapter.tensors if stored.get(key.module, key.module) not in known]
    factors = [key for key in keys if key.role in FACTORS]
    found: list[Loss] = []
    for named, message in ((False, _NO_TARGET), (True, _NO_WEIGHT)):
        drops = [key for key in factors if (_last(key.module) in settings.target_modules) is named]
        if drops:
            subject = first_and_more(list(dict.fromkeys(key.module for key in drops)))
            found.append(Loss("no-target", subject, message, tuple(drops)))
    others = [key for key in adapter.tensors if key.role not in FACTORS]
    if others:
        subject = first_and_more([str(key) for key in others])
        found.append(Loss("not-an-update", subject, NO_PLACE, tuple(others)))
    return tuple(found)


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _stored(adapter: AdapterTensorSet, base: BaseModel) -> dict[str, str]:
    """Return what the checkpoint calls the modules that it names otherwise than the adapter."""
    places = Places(base)
    found = {name: places.find(name + _WEIGHT) for name in adapter.modules}
    return {name: each.removesuffix(_WEIGHT) for name, each in found.items() if each}
