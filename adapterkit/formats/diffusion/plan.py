"""Which modules of a spelling an adapter's updates go to, and which have no place in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.formats.diffusion.keys import DENOISER, parse
from adapterkit.formats.diffusion.of_base import of_base
from adapterkit.formats.diffusion.patterns import underscored
from adapterkit.formats.diffusion.table import Row
from adapterkit.formats.diffusion.telling import Spelled, nearest, placed, title, told
from adapterkit.model import PeftSource

if TYPE_CHECKING:
    from adapterkit.base.model import BaseModel
    from adapterkit.formats.diffusion.table import Model
    from adapterkit.formats.diffusion.telling import Place
    from adapterkit.model import AdapterTensorSet

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True, slots=True)
class Destination:
    """A module of the file to write.

    Attributes:
        stem: what its tensors' names begin with.
        row: of the table, where it is one of the original checkpoint's; None for diffusers' own.
        part: which part of it an update is.
        published: its name in the checkpoint as it was published, without a prefix, where that is
            another.
    """

    stem: str
    row: Row | None = None
    part: int = 0
    published: str = ""

    @property
    def meaning(self) -> tuple[object, ...]:
        """What it says of an update; two models may agree on it."""
        return self.stem, self.part, self.row and (self.row.shares, self.row.order)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything goes.

    Attributes:
        destinations: by module of the adapter.
        misplaced: module -> why it goes nowhere.
    """

    destinations: Mapping[str, Destination]
    misplaced: Mapping[str, str]

    def fused(self) -> Mapping[str, list[tuple[str, Destination]]]:
        """Return the modules of each stem."""
        found: dict[str, list[tuple[str, Destination]]] = defaultdict(list)
        for module, destination in self.destinations.items():
            found[destination.stem].append((module, destination))
        return found


def planned(adapter: AdapterTensorSet, spelling: str, *, base: BaseModel | None = None) -> Plan:
    """Return where every module of an adapter goes in a spelling; no tensor data is read.

    Of models that have all modules, those count that a base is nearest to, if one is given.
    """
    spelled = {module: _spelled(module) for module in adapter.modules}
    sized = {pair.module: pair.matrix_shape for pair in adapter.pairs() if pair.sound}
    everything = [
        replace(each, outputs=rows, inputs=columns)
        for module, each in spelled.items()
        for rows, columns in [sized.get(module, (0, 0))]
    ]
    found = of_base(told(everything, adapter.metadata), base)
    destinations: dict[str, Destination] = {}
    misplaced: dict[str, str] = {}
    for module, each in spelled.items():
        places = [(model, place) for model in found if (place := placed(model, each))]
        options = [_destination(model, place, spelling) for model, place in places]
        if len({option.meaning for option in options}) == 1:
            destinations[module] = options[0]
        elif spelling == "diffusers" and each.component != DENOISER and not _of_language(adapter):
            destinations[module] = Destination(module)
        else:
            misplaced[module] = _why(found, everything, each)
    if all(each.component.startswith("text_encoder") for each in spelled.values()):
        misplaced |= _unreadable(destinations, adapter, spelling)
    kept = {module: to for module, to in destinations.items() if module not in misplaced}
    return Plan(kept, misplaced)


def _unreadable(
    destinations: Mapping[str, Destination], adapter: AdapterTensorSet, spelling: str
) -> dict[str, str]:
    """Return the modules whose names in a file of text encoders alone are those of others too."""
    if spelling == "diffusers":
        return {}
    keys = {module: parse(f"{to.stem}.alpha") for module, to in destinations.items()}
    spelled = {m: Spelled(key.component, key.path, key.underscored) for m, key in keys.items()}
    found = told(list(spelled.values()), adapter.metadata)
    unreadable: dict[str, str] = {}
    for module, each in spelled.items():
        if len({place.meaning for model in found if (place := placed(model, each))}) > 1:
            unreadable[module] = (
                f"its name there could be of {title(found, list(spelled.values()))}, where it is "
                "another module each; write diffusers or peft"
            )
    return unreadable


def _of_language(adapter: AdapterTensorSet) -> bool:
    """Tell whether PEFT trained it for a task of language: GPT-2 has a `transformer` too."""
    return isinstance(adapter.source, PeftSource) and bool(adapter.source.config.get("task_type"))


def _spelled(module: str) -> Spelled:
    component, _, path = module.partition(".")
    return Spelled(component, path) if component in COMPONENTS else Spelled(DENOISER, module)


def _destination(model: Model, place: Place, spelling: str) -> Destination:
    site = place.site
    part = site.part or 0
    if spelling == "diffusers":
        return Destination(f"{place.component}.{site.parts[part]}")
    encoder = place.encoder
    if spelling == "comfyui":
        prefix = f"text_encoders.{encoder.comfyui}.transformer." if encoder else "diffusion_model."
        return Destination(prefix + site.original, site.row, part, site.published)
    prefix = f"lora_{encoder.kohya[0] if encoder else 'unet'}_"
    if encoder or model.kohya == "original":
        return Destination(prefix + underscored(site.published), site.row, part)
    return Destination(prefix + underscored(site.parts[part]))


def _why(found: tuple[Model, ...], everything: list[Spelled], module: Spelled) -> str:
    if found:
        return f"the model may be {title(found, everything)}, which are spelled differently"
    best = nearest(everything)
    if best and placed(best, module) is None:
        return f"is no module of {best.title}, whose names it would need"
    if best:
        return f"is of {best.title}, which has not all modules of the adapter"
    return "is no module of a diffusion model that is known"
