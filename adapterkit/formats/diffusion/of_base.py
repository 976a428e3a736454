"""Which diffusion model a base is, told by how many of its tensors a table names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.formats.diffusion.table import Model

# What stands before a denoiser's tensors in a single file; the first that a file has.
DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_WEIGHT = ".weight"


def of_base(found: Sequence[Model], base: BaseModel | None) -> tuple[Model, ...]:
    """Return the models that a base may be, of some; all of them if it says nothing.

    Args:
        found: models that an adapter may be for.
        base: any; it says something if it is a diffusion model with one of theirs' names.
    """
    if base is None or not base.layout or len(found) < 2:  # noqa: PLR2004  (nothing to tell)
        return tuple(found)
    counts = [sum(_names(model, base)) for model in found]
    best = max(counts)
    return tuple(m for m, count in zip(found, counts, strict=True) if count == best)


def _names(model: Model, base: BaseModel) -> Iterator[bool]:
    """Tell of every weight whether a model's denoiser has it, by the names of the base's layout."""
    if base.layout == "pipeline":
        prefix, find = f"{model.component}.", model.names.diffusers
    else:
        prefix, find = _prefix(base), model.names.original
    for name in base.names:
        if name.startswith(prefix) and name.endswith(_WEIGHT):
            yield find(name.removeprefix(prefix).removesuffix(_WEIGHT)) is not None


def _prefix(base: BaseModel) -> str:
    held = (p for p in DENOISER_PREFIXES if any(name.startswith(p) for name in base.names))
    return next(held, "")
