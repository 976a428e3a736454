"""An adapter under the names of a base: of a directory of diffusers, or of a single file.

In a single file, attention may be fused that diffusers splits, and halves of rows may stand in the
other order. Convolutions of kernel size 1 are linear layers in some versions of a model; an update
of the one is one of the other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.errors import IncompatibleBaseError, UnsupportedError
from adapterkit.formats.diffusion.keys import DENOISER
from adapterkit.formats.diffusion.of_base import DENOISER_PREFIXES, of_base
from adapterkit.formats.diffusion.plan import Destination, planned
from adapterkit.formats.diffusion.reader import pieces_of
from adapterkit.formats.diffusion.rows import Moved, matrix
from adapterkit.formats.diffusion.table import models, network
from adapterkit.formats.diffusion.telling import Spelled, placed, told
from adapterkit.formats.diffusion.writer import whole_of, with_others
from adapterkit.keys import Role, TensorKey
from adapterkit.model import Kind, Update
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet

_MATRIX = 2
_DENOISER = "diffusion_model."
# What stands before a network in files: one of these, the first that the file has.
_PREFIXES = {
    _DENOISER: DENOISER_PREFIXES,
    "text_encoders.clip_l.transformer.": (
        *("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
        *("text_encoders.clip_l.transformer.", "cond_stage_model.model."),
    ),
    "text_encoders.clip_g.transformer.": (
        *("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
        "conditioner.embedders.0.model.",
    ),
    "text_encoders.t5xxl.transformer.": ("text_encoders.t5xxl.transformer.",),
}
_OPEN_CLIP = "transformer.resblocks."


def on_base(adapter: AdapterTensorSet, base: BaseModel) -> AdapterTensorSet:
    """Return an adapter with the names and the axes of a diffusion model's own tensors.

    Raises:
        UnsupportedError: if a module has no name there.
        IncompatibleBaseError: if updates that are one there do not fit together.
    """
    return with_origins(adapter, base)[0]


def with_origins(
    adapter: AdapterTensorSet, base: BaseModel
) -> tuple[AdapterTensorSet, Mapping[str, tuple[str, ...]]]:
    """Return the same, and the modules of the adapter that each module there is made of.

    Raises:
        UnsupportedError: if a module has no name there.
        IncompatibleBaseError: if updates that are one there do not fit together.
    """
    named, origins = (_named if base.layout == "checkpoint" else _placed)(adapter, base)
    fitted = [replace(pair, **_axes(pair, base)) for pair in named.pairs()]
    return named.updated(fitted), origins


def from_base(adapter: AdapterTensorSet, base: BaseModel) -> AdapterTensorSet:
    """Return what was found between the tensors of two bases under diffusers' names.

    Convolutions, which were matrices, get their axes; what is fused in a single file is split.

    Raises:
        UnsupportedError: if no model that is known has such modules, or a parameter of a single
            file is saved whole.
    """
    folded = [_folded(pair, base) for pair in adapter.pairs()]
    if base.layout == "pipeline":
        return adapter.updated(folded)
    for key in adapter.tensors:
        if key.role is Role.FULL:
            raise UnsupportedError(
                "is no factor, and what diffusers calls it is in no table; give both models "
                "as directories of diffusers, or leave --save-rest out",
                path=base.path,
                where=key.module,
            )
    spelled = {pair.module: _spelled_out(pair, base) for pair in folded}
    found = of_base(told(list(spelled.values()), {}), base)
    if not found:
        names = ", ".join(model.title for model in models())
        raise UnsupportedError(f"is no checkpoint of {names}", path=base.path)
    updates: list[Update] = []
    for pair in folded:
        place = placed(found[0], spelled[pair.module])
        pieces = pieces_of(place, Moved(pair, {})) if place else []
        names = place.modules if place else ()
        updates += [
            replace(piece.update, module=name) for name, piece in zip(names, pieces, strict=True)
        ]
    return adapter.replace(tensors={}, scales={}, kinds={}).updated(updates)


def _spelled_out(pair: Update, base: BaseModel) -> Spelled:
    """Return a module of a single file as a LoRA file of ComfyUI would name it."""
    for name in reversed(_PREFIXES):  # the denoiser's may be empty
        prefix = _prefix(name, base)
        if not pair.module.startswith(prefix):
            continue
        component = DENOISER if name == _DENOISER else name.split(".")[1]
        path = pair.module.removeprefix(prefix)
        rows, columns = pair.matrix_shape
        return Spelled(component, path, outputs=rows, inputs=columns)
    return Spelled(DENOISER, pair.module)


def _folded(pair: Update, base: BaseModel) -> Update:
    stored = base.tensors.get(f"{pair.module}.weight")
    if stored is None or len(stored.shape) <= _MATRIX:
        return pair
    to_a = (pair.rank, *stored.shape[1:])
    to_b = (*pair.b.shape, *[1] * (len(stored.shape) - _MATRIX))
    a = pair.a.map(lambda x: x.reshape(to_a), shape=to_a)
    b = pair.b.map(lambda x: x.reshape(to_b), shape=to_b)
    return replace(pair, a=a, b=b, kind=Kind.CONVOLUTION)


def flattened(base: BaseModel) -> BaseModel:
    """Return a base whose convolutions are matrices (out, in · kernel)."""
    tensors = {
        name: tensor
        if len(tensor.shape) <= _MATRIX
        else LazyTensor(tensor.dtype, (tensor.shape[0], math.prod(tensor.shape[1:])), tensor.read)
        for name, tensor in base.tensors.items()
    }
    return replace(base, tensors=tensors)


def _placed(
    adapter: AdapterTensorSet, base: BaseModel
) -> tuple[AdapterTensorSet, Mapping[str, tuple[str, ...]]]:
    """Return an adapter whose modules have their component's name, where only one has them."""
    moved: dict[str, str] = {}
    for module in adapter.modules:
        found = [name for name in base.folders if f"{name}.{module}.weight" in base.tensors]
        if f"{module}.weight" not in base.tensors and len(found) == 1:
            moved[module] = f"{found[0]}.{module}"
    origins = {moved.get(module, module): (module,) for module in adapter.modules}
    if not moved:
        return adapter, origins
    tensors = {
        TensorKey(moved.get(key.module, key.module), key.role): tensor
        for key, tensor in adapter.tensors.items()
    }
    scales = {moved.get(module, module): scale for module, scale in adapter.scales.items()}
    kinds = {moved.get(module, module): kind for module, kind in adapter.kinds.items()}
    return adapter.replace(tensors=tensors, scales=scales, kinds=kinds), origins


def _named(
    adapter: AdapterTensorSet, base: BaseModel
) -> tuple[AdapterTensorSet, Mapping[str, tuple[str, ...]]]:
    plan = planned(adapter, "comfyui", base=base)
    path = adapter.provenance.path if adapter.provenance else None
    for module, why in plan.misplaced.items():
        raise UnsupportedError(why, path=path, where=module)
    prefixes = {name: _prefix(name, base) for name in _PREFIXES}
    found: dict[str, list[tuple[str, Destination]]] = defaultdict(list)
    for module, destination in plan.destinations.items():
        stored = _stored(destination, prefixes, base)
        found[stored.stem].append((module, stored))
    updates = {pair.module: pair for pair in adapter.pairs()}
    wholes: dict[str, Moved] = {}
    for stem, members in found.items():
        parts = {d.part: with_others(adapter, updates[m]) for m, d in members if m in updates}
        try:
            wholes[stem] = whole_of(parts, members[0][1])
        except ValueError as error:
            raise IncompatibleBaseError(str(error), path=path, where=stem) from None
    others: dict[TensorKey, LazyTensor] = {
        TensorKey(stem, role): tensor
        for stem, whole in wholes.items()
        for role, tensor in whole.others.items()
    }
    renamed = [replace(whole.update, module=stem) for stem, whole in wholes.items()]
    origins = {
        stem: tuple(module for module, _ in sorted(members, key=lambda member: member[1].part))
        for stem, members in found.items()
    }
    return adapter.replace(tensors={}, scales={}, kinds={}).updated(renamed, others), origins


def _prefix(name: str, base: BaseModel) -> str:
    every = _PREFIXES[name]
    held = (prefix for prefix in every if any(each.startswith(prefix) for each in base.names))
    return next(held, every[0])


def _stored(destination: Destination, prefixes: dict[str, str], base: BaseModel) -> Destination:
    """Return where an update goes among the names of a file."""
    name = next(each for each in prefixes if destination.stem.startswith(each))
    path, prefix = destination.stem.removeprefix(name), prefixes[name]
    if name != _DENOISER and any(each.startswith(prefix + _OPEN_CLIP) for each in base.names):
        site = network("open_clip").diffusers(path)
        if site is None:
            raise UnsupportedError(f"has no place in {prefix}{_OPEN_CLIP}...", where=path)
        return Destination(prefix + site.original, site.row, site.part or 0)
    if destination.row and destination.row.kohya and f"{prefix}{path}.weight" not in base.tensors:
        path = destination.published
    return replace(destination, stem=prefix + path)


def _axes(pair: Update, base: BaseModel) -> dict[str, object]:
    """Return factors with the axes of the weight that they are added to."""
    stored = base.tensors.get(f"{pair.module}.weight")
    if stored is None or len(stored.shape) == len(pair.shape):
        return {}
    if pair.kind is Kind.CONVOLUTION and stored.is_matrix:
        if pair.matrix_shape != stored.shape:
            return {}
        plain = matrix(pair)
        return {"a": plain.a, "b": plain.b, "kind": Kind.LINEAR}
    ones = stored.shape[_MATRIX:]
    if pair.kind is not Kind.LINEAR or set(ones) != {1}:
        return {}
    shapes = [(*factor.shape, *ones) for factor in (pair.a, pair.b)]
    a, b = (
        factor.map(lambda x, shape=shape: x.reshape(shape), shape=shape)
        for factor, shape in zip((pair.a, pair.b), shapes, strict=True)
    )
    return {"a": a, "b": b, "kind": Kind.CONVOLUTION}
