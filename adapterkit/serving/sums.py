"""What the adapters of a stack do together: where they meet, and their sum as one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.factors import concatenated
from adapterkit.keys import Role, TensorKey
from adapterkit.lowrank.differences import difference
from adapterkit.model import AdapterTensorSet, Update
from adapterkit.model.joining import joint_base, joint_source
from adapterkit.model.tying import one_spelling
from adapterkit.serving.members import AdapterIncompatibleError, StackedAdapter
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

# Two updates whose sum is smaller than this share of either cancel.
_CANCELLED = 0.05


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two adapters that meet on a module.

    Attributes:
        module: where.
        first: name of one adapter.
        second: name of the other.
        cosine: of the two scaled updates; None if one is zero.
        cancels: whether nearly nothing is left of them together.
    """

    module: str
    first: str
    second: str
    cosine: float | None
    cancels: bool


def conflicts(members: Sequence[StackedAdapter]) -> Iterator[Conflict]:
    """Yield every module that two adapters change, and how much of it is left."""
    for place, first in enumerate(members):
        mine = {pair.module: pair for pair in _scaled_pairs(first.adapter, first.scale)}
        for second in members[place + 1 :]:
            for pair in _scaled_pairs(second.adapter, second.scale):
                other = mine.get(pair.module)
                if other and (other.kind, other.shape) == (pair.kind, pair.shape):
                    yield _conflict(other, pair, first.name, second.name)


def combined(members: Sequence[StackedAdapter]) -> AdapterTensorSet:
    """Return one adapter for all: ranks add up, the update is the exact sum.

    Raises:
        AdapterIncompatibleError: if an adapter holds more than pairs of factors, or trained weights
            lie beside it.
    """
    for member in members:
        _check_summable(member)
    adapters, tied = one_spelling([member.adapter for member in members])
    groups: dict[str, list[Update]] = {}
    for member, adapter in zip(members, adapters, strict=True):
        for pair in _scaled_pairs(adapter, member.scale):
            groups.setdefault(pair.module, []).append(pair)
    return AdapterTensorSet.of(
        map(concatenated, groups.values()),
        _base_copies(members),
        base=joint_base(adapters),
        source=joint_source(adapters),
    ).replace(tied=tied)


def _scaled_pairs(adapter: AdapterTensorSet, scale: float) -> Iterator[Update]:
    for pair in adapter.pairs():
        yield replace(pair, scale=pair.scale * scale)


def _conflict(one: Update, other: Update, first: str, second: str) -> Conflict:
    # ‖ΔW₁ + ΔW₂‖ is the distance of ΔW₁ from -ΔW₂.
    opposite = difference(one, replace(other, scale=-other.scale))
    cosine = None if opposite.cosine is None else -opposite.cosine
    return Conflict(one.module, first, second, cosine, opposite.relative_error < _CANCELLED)


def _base_copies(members: Sequence[StackedAdapter]) -> dict[TensorKey, LazyTensor]:
    """Return the weights of the base that the files carry along."""
    found: dict[TensorKey, LazyTensor] = {}
    for member in members:
        for key, tensor in member.adapter.tensors.items():
            if key.role is not Role.BASE_COPY:
                continue
            if key in found and found[key].tobytes() != tensor.tobytes():
                message = "is a copy of the base's weight, and another adapter has another"
                raise AdapterIncompatibleError(message, path=member.path, where=str(key))
            found[key] = tensor
    return found


def _check_summable(member: StackedAdapter) -> None:
    adapter = member.adapter
    factors = {key for pair in adapter.pairs() for key in pair.keys}
    for key in adapter.tensors:
        if key not in factors and key.role is not Role.BASE_COPY:
            raise AdapterIncompatibleError(
                "is no pair of factors and cannot be added up", path=member.path, where=str(key)
            )
    if settings := [*adapter.settings, *(["engine_layout"] if adapter.engine_layout else [])]:
        raise AdapterIncompatibleError(
            f"{settings[0]} makes it more than a sum of updates", path=member.path
        )
    if trained := [file for file in adapter.beside if file.trained]:
        raise AdapterIncompatibleError(
            f"{trained[0].name} lies beside it ({trained[0].what}), and a sum of updates has no "
            "place for it; leave the file out of the folder to go without",
            path=member.path,
        )
