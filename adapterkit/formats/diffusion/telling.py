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
# A number in a name is of any length.
_DIGITS, _BEYOND = 6, 1 << 20


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
        cut = self.site.part is None and (len(row.shares) > 1 or row.order)
        moved = (row.shares, row.order) if cut else ()
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
        [model for model in fitting if _reached(model, modules)],
        [model for model in fitting if _as_wide(model, modules)],
        _declared(fitting, metadata),
        [model for model in fitting if _own(model, modules)],
    ):
        if len(fitting) > 1 and narrowed:
            fitting = [model for model in fitting if model in narrowed]
    return tuple(fitting)


def most(modules: Sequence[Spelled]) -> int:
    """Return how many of the modules one model has, at most."""
    return max(sum(placed(model, each) is not None for each in modules) for model in models())


def nearest(modules: Sequence[Spelled]) -> Model | None:
    """Return the model that has most of the modules, None if none has any."""
    counts = [(sum(placed(m, each) is not None for each in modules), m) for m in models()]
    count, model = max(counts, key=lambda pair: pair[0])
    return model if count else None


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
    counts = _counts(model, modules)
    return all(count <= max(model.blocks[blocks]) for blocks, count in counts.items())


def _reached(model: Model, modules: Sequence[Spelled]) -> bool:
    """Tell whether the last block of every kind is the last one of a model, in one of its sizes."""
    counts = _counts(model, modules)
    return bool(counts) and all(count in model.blocks[kind] for kind, count in counts.items())


def _counts(model: Model, modules: Sequence[Spelled]) -> dict[str, int]:
    """Return how many blocks there are up to the last that is named, of kinds that are counted."""
    found: dict[str, int] = {}
    for module in modules:
        place = placed(model, module)
        for part in place.site.parts if place and not place.encoder else ():
            blocks, _, rest = part.partition(".")
            if blocks in model.blocks:
                number = rest.partition(".")[0]
                count = int(number) + 1 if len(number) < _DIGITS else _BEYOND
                found[blocks] = max(found.get(blocks, 0), count)
    return found


def _as_wide(model: Model, modules: Sequence[Spelled]) -> bool:
    return any(
        _ends(module, end, width)
        for variant in model.variants
        for end, width in variant.inputs.items()
        for module in modules
    )


def _own(model: Model, modules: Sequence[Spelled]) -> bool:
    """Tell whether names are those that a model's trainers write, not what ComfyUI made of them."""
    sites = [place.site for each in modules if (place := placed(model, each))]
    return not any(site.part is None and site.renamed for site in sites)


def _declared(fitting: Sequence[Model], metadata: Mapping[str, str]) -> list[Model]:
    """Return the models that a file's metadata names: `flux2` is no `flux`, though it begins so."""
    said = (metadata.get(_ARCHITECTURE, "").lower(), metadata.get(_VERSION, "").lower())
    lengths = [
        max(
            (len(name) for name in model.declared for text in said if text.startswith(name)),
            default=0,
        )
        for model in fitting
    ]
    return [m for m, n in zip(fitting, lengths, strict=True) if n and n == max(lengths)]
