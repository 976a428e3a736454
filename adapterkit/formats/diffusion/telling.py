"""Which diffusion model an adapter is for: told by names first, by sizes where those are shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.formats.diffusion.keys import DENOISER
from adapterkit.formats.diffusion.patterns import shape
from adapterkit.formats.diffusion.table import Encoder, Model, Site, models

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_ARCHITECTURE = "modelspec.architecture"
_VERSION = "ss_base_model_version"


@dataclass(frozen=True, slots=True)
class Spelled:
    """A module as a file names it.

    Attributes:
        component: DENOISER or a text encoder, by any spelling; empty if the file does not say.
        path: inside the component.
        flat: whether its dots are underscores.
        outputs: rows of its update; 0 if unknown.
        inputs: columns.
    """

    component: str
    path: str
    flat: bool = False
    outputs: int = 0
    inputs: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module stands in a model.

    Attributes:
        site: in the table of its network.
        component: name of the network in diffusers.
        encoder: the text encoder; None for the denoiser.
    """

    site: Site
    component: str
    encoder: Encoder | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Its names in the neutral model: those of all parts, or of the part that was named."""
        parts = self.site.parts
        named = parts if self.site.part is None else (parts[self.site.part],)
        return tuple(f"{self.component}.{part}" for part in named)

    @property
    def meaning(self) -> tuple[object, ...]:
        """What its name says of an update; two places with one meaning are one to a reader."""
        row = self.site.row
        cut = self.site.part is None and (len(row.shares) > 1 or row.swapped)
        moved = (row.shares, row.swapped) if cut else ()
        return (self.modules, row.kernel, moved)


def placed(model: Model, module: Spelled) -> Place | None:
    """Return where a module stands in a model, None if it has no such module."""
    if module.component in {DENOISER, model.component, ""}:
        site = model.names.find(module.path, flat=module.flat)
        return site and Place(site, model.component)
    encoder = model.encoder(module.component, module.path, flat=module.flat)
    site = encoder and encoder.names.find(module.path, flat=module.flat)
    return encoder and site and Place(site, encoder.component, encoder)


def told(modules: Sequence[Spelled], metadata: Mapping[str, str]) -> tuple[Model, ...]:
    """Return the models that have every module; several where nothing tells them apart."""
    fitting = [model for model in models() if all(placed(model, each) for each in modules)]
    fitting = [model for model in fitting if all(_sized(model, each) for each in modules)]
    for narrowed in (
        [model for model in fitting if _counted(model, modules)],
        [model for model in fitting if _as_wide(model, modules)],
        [model for model in fitting if _declared(model, metadata)],
    ):
        if len(fitting) > 1 and narrowed:
            fitting = [model for model in fitting if model in narrowed]
    return tuple(fitting)


def most(modules: Sequence[Spelled]) -> int:
    """Return how many of the modules one model has, at most."""
    return max(sum(placed(model, each) is not None for each in modules) for model in models())


def nearest(modules: Sequence[Spelled]) -> tuple[Model, Spelled] | None:
    """Return the model that has most of the modules and the first that it lacks, if it has any."""
    counts = [(sum(placed(m, each) is not None for each in modules), m) for m in models()]
    count, model = max(counts, key=lambda pair: pair[0])
    missing = [each for each in modules if placed(model, each) is None]
    return (model, missing[0]) if count and missing else None


def title(found: Iterable[Model], modules: Sequence[Spelled]) -> str:
    """Return what people call the model, all names where it may be several."""
    return " or ".join(dict.fromkeys(_variant(model, modules) for model in found))


def _variant(model: Model, modules: Sequence[Spelled]) -> str:
    names = [
        shape(part)
        for module in modules
        if (place := placed(model, module)) and place.encoder is None
        for part in place.site.parts
    ]
    for variant in model.variants:
        if variant.has and any(name.startswith(shape(variant.has)) for name in names):
            return variant.title
        if any(
            _ends(module, end, width) for module in modules for end, width in variant.inputs.items()
        ):
            return variant.title
    return model.title


def _ends(module: Spelled, end: str, width: int) -> bool:
    path = module.path.replace(".", "_")
    return module.inputs == width and path.endswith(end.replace(".", "_"))


def _sized(model: Model, module: Spelled) -> bool:
    """Tell whether an update has the shape that a model's module has."""
    place = placed(model, module)
    if place is None or place.encoder or not module.inputs:
        return True
    if place.site.part is not None and len(place.site.parts) > 1:
        return True
    found = model.ratio_index.find(place.site.original)
    return found is None or module.outputs * found[0][1] == module.inputs * found[0][0]


def _counted(model: Model, modules: Sequence[Spelled]) -> bool:
    """Tell whether no block is beyond the last one of a model."""
    for module in modules:
        place = placed(model, module)
        for part in place.site.parts if place and not place.encoder else ():
            blocks, _, rest = part.partition(".")
            number = rest.partition(".")[0]
            if blocks in model.blocks and not _below(number, model.blocks[blocks]):
                return False
    return True


def _below(number: str, count: int) -> bool:
    """Tell whether a number in a name, of any length, is below a count."""
    return len(number) <= len(str(count)) and int(number) < count


def _as_wide(model: Model, modules: Sequence[Spelled]) -> bool:
    return any(
        _ends(module, end, width)
        for variant in model.variants
        for end, width in variant.inputs.items()
        for module in modules
    )


def _declared(model: Model, metadata: Mapping[str, str]) -> bool:
    said = (metadata.get(_ARCHITECTURE, "").lower(), metadata.get(_VERSION, "").lower())
    return any(text.startswith(model.declared) for text in said if text and model.declared)
