"""Which stored weight of a base each update changes, in a Hugging Face checkpoint or a GGUF file.

For GGUF, factors move into llama.cpp's row order rather than the weight back into Hugging Face's:
no norm, singular value or angle depends on the order of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.architectures.mapping import from_engine, to_engine
from adapterkit.auditing.base_report import NotCompared
from adapterkit.base.places import Places
from adapterkit.base.spreading import spread
from adapterkit.dtype import DType
from adapterkit.errors import AdapterKitError, UnsupportedError
from adapterkit.keys import Role
from adapterkit.model import Kind, Update
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet

_TABLE, _OUTPUT = "token_embd", "output"
_OTHERS = {
    Role.FULL: "is a parameter that was trained whole, and no update",
    Role.TOKEN_ROWS: "holds rows of tokens that were trained whole, and no update",
    Role.LORA_BIAS: "has a bias beside its update",
    Role.COLUMN_MAGNITUDE: "has DoRA magnitudes by column, which are not measured",
}


@dataclass(frozen=True, slots=True)
class Site:
    """An update beside the weight that it changes.

    Attributes:
        modules: the adapted modules; several where the base holds them in one tensor.
        pair: factors in the base's row order; `module` is the base's name of the place.
        stored: the weight.
        turned: whether it is stored as (in, out).
        magnitude: (out,) of DoRA, float64, in the base's row order.
        expert: number of the expert whose weight it is, where the base holds each on its own.
    """

    modules: tuple[str, ...]
    pair: Update
    stored: LazyTensor
    turned: bool
    magnitude: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
    expert: int | None = None


def sites(adapter: AdapterTensorSet, base: BaseModel) -> tuple[list[Site], list[NotCompared]]:
    """Return every update with its weight, and those for which there is none."""
    magnitudes = {
        key.module: tensor for key, tensor in adapter.tensors.items() if key.role is Role.MAGNITUDE
    }
    by_column = {key.module for key in adapter.tensors if key.role is Role.COLUMN_MAGNITUDE}
    pairs = [
        _with_magnitude(pair, magnitudes.get(pair.module))
        for pair in adapter.pairs()
        if pair.module not in by_column
    ]
    if base.kind == "gguf":
        found, missing = _in_gguf(pairs, base)
    else:
        found, missing = _in_checkpoint(pairs, base, adapter)
    usable: list[Site] = []
    for site in found:
        try:
            usable.append(_without_magnitude(site, magnitudes))
        except ValueError as error:
            missing += [NotCompared(module, str(error)) for module in site.modules]
    return usable, missing + _whole(adapter)


def _whole(adapter: AdapterTensorSet) -> list[NotCompared]:
    """Return what an adapter trained that is no update of a matrix."""
    return [
        NotCompared(key.module, _OTHERS[key.role]) for key in adapter.tensors if key.role in _OTHERS
    ]


def _with_magnitude(pair: Update, magnitude: LazyTensor | None) -> Update:
    """Return a pair whose B has the magnitude as one more column, so that rows keep theirs.

    The row of A beside it is zero: the product stays the same.
    """
    if magnitude is None or magnitude.size != pair.b.shape[0] or pair.kind is Kind.EXPERTS:
        return pair
    values = magnitude.numpy().astype(np.float64).reshape(-1)
    ((b, a),) = pair.matrices()
    return replace(
        pair,
        a=LazyTensor.of(np.concatenate([a, np.zeros((1, a.shape[1]))])),
        b=LazyTensor.of(np.concatenate([b, values[:, None]], axis=1)),
        kind=pair.kind if pair.embedding else Kind.LINEAR,
    )


def _without_magnitude(site: Site, magnitudes: Mapping[str, LazyTensor]) -> Site:
    """Take the magnitude's column off again; its scale is that by which the base's tensor differs.

    Raises:
        ValueError: if the tensor, or its type, says nothing of this module.
    """
    if site.stored.dtype.scaled or not (site.stored.dtype.floating or site.stored.dtype.quantised):
        kind = site.stored.dtype.value
        raise ValueError(f"is stored as packed {kind}; give the model before it was quantised")
    normed = [module for module in site.modules if module in magnitudes]
    if not normed:
        return site
    if len(site.modules) > 1 or site.pair.kind is Kind.EXPERTS:
        raise ValueError("has a DoRA magnitude, and the base holds it as a part of another tensor")
    a, b = site.pair.a.numpy(), site.pair.b.numpy()
    if magnitudes[normed[0]].size != len(b):
        raise ValueError("has a DoRA magnitude that does not fit its rows")
    pair = replace(site.pair, a=LazyTensor.of(a[:-1]), b=LazyTensor.of(b[:, :-1]))
    return replace(site, pair=pair, magnitude=b[:, -1])


def _in_gguf(pairs: list[Update], base: BaseModel) -> tuple[list[Site], list[NotCompared]]:
    scales = {pair.module: pair.scale for pair in pairs}
    mapped = to_engine(base.architecture, base.sizes, pairs, base.tensors)
    missing = [
        NotCompared(module, f"has no place in a GGUF of {base.architecture.title}")
        for module in mapped.unmatched
    ]
    found: list[Site] = []
    for pair in mapped.pairs:
        origins = mapped.sources[pair.module]
        table = _TABLE if pair.module == _OUTPUT and base.tied else pair.module
        stored = base.tensors.get(f"{table}.weight")
        if stored is None:
            missing += [NotCompared(o, f"the base has no {pair.module}.weight") for o in origins]
            continue
        # A factor that the converter put on the weight is on a DoRA's magnitude as well.
        ratio = pair.scale / scales[origins[0]] if scales[origins[0]] else 1.0
        found.append(_rescaled(Site(origins, pair, stored, turned=pair.embedding), ratio))
    return found, missing


def _rescaled(site: Site, ratio: float) -> Site:
    if ratio == 1:
        return site
    scaled = site.pair.b.map(lambda b: b * ratio, dtype=DType.F64)
    return replace(site, pair=replace(site.pair, b=scaled, scale=site.pair.scale / ratio))


def _in_checkpoint(
    pairs: list[Update], base: BaseModel, adapter: AdapterTensorSet
) -> tuple[list[Site], list[NotCompared]]:
    places = Places(base)
    found: list[Site] = []
    missing: list[NotCompared] = []
    elsewhere: list[Update] = []
    for pair in pairs:
        stored = _stored(pair.module, places)
        if stored is None:
            elsewhere.append(pair)
            continue
        try:
            turned = places.turned(pair, stored, adapter)
        except UnsupportedError as error:
            missing.append(NotCompared(pair.module, error.message))
        else:
            found.append(Site((pair.module,), pair, stored, turned))
    respelled, absent = _respelled(elsewhere, places, adapter)
    return found + respelled, missing + absent


def _stored(module: str, places: Places) -> LazyTensor | None:
    """Return a module's weight, a bare parameter, or the table that an absent output shares."""
    if (weight := places.stored(module)) is not None:
        return weight
    name = places.of(module) or places.shared(f"{module}.weight")
    return places.base.tensors[name] if name else None


def _respelled(
    pairs: list[Update], places: Places, adapter: AdapterTensorSet
) -> tuple[list[Site], list[NotCompared]]:
    """Look experts and fused projections up under the checkpoint's spelling, by llama.cpp's."""
    base, apart = places.base, spread(pairs, places)
    found: list[Site] = []
    for pair in apart.pairs:
        origins, stored = apart.sources[pair.module], _stored(pair.module, places)
        if stored is not None:
            number = _number(pair, origins, pairs)
            found.append(Site(origins, pair, stored, turned=False, expert=number))
    pairs = apart.left
    if not pairs:
        return found, []
    if not base.architecture.known:
        return found, _absent((pair.module for pair in pairs), "is not in the base")
    try:
        there = to_engine(base.architecture, base.sizes, pairs)
        back = from_engine(base.architecture, base.sizes, there.pairs, like=places.spelled)
    except AdapterKitError as error:
        return found, _absent((p.module for p in pairs), f"is not in the base: {error.message}")
    missing = _absent(there.unmatched, "is not in the base")
    for pair in back.pairs:
        origins = tuple(o for part in back.sources[pair.module] for o in there.sources[part])
        stored = _stored(pair.module, places)
        if stored is None:
            missing += _absent(origins, "is not in the base")
        else:
            turned = places.turned(pair, stored, adapter)
            found.append(Site(origins, pair, stored, turned, expert=_number(pair, origins, pairs)))
    return found, missing


def _number(pair: Update, origins: Sequence[str], adapted: Iterable[Update]) -> int | None:
    """Return which expert of a fused update one matrix of the base is: a number that it gains."""
    fused = {each.module for each in adapted if each.kind is Kind.EXPERTS}
    if pair.kind is Kind.EXPERTS or not fused.intersection(origins):
        return None
    before, after = (
        [int(part) for part in name.split(".") if part.isdecimal()]
        for name in (origins[0], pair.module)
    )
    return after[len(before)] if len(after) > len(before) else None


def _absent(modules: Iterable[str], reason: str) -> list[NotCompared]:
    return [NotCompared(module, reason) for module in modules]
