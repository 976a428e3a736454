"""Updates of modules, as updates of the stored tensors that their class makes weights of."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterkit import factors
from adapterkit.model import Kind, Update

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adapterkit.base.assemblies import Assembly
    from adapterkit.base.places import Places

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Spread:
    """Updates of modules as updates of stored tensors.

    Attributes:
        pairs: each under the stored tensor's name without `.weight`.
        sources: that name -> the modules that went into it.
        left: updates that no assembly tells of.
    """

    pairs: list[Update] = field(default_factory=list[Update])
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    left: list[Update] = field(default_factory=list[Update])


def spread(pairs: Iterable[Update], places: Places) -> Spread:
    """Return updates as those of the stored tensors that their modules are made of, exactly.

    Rows of one tensor that no update is of have an update of zero.
    """
    done = Spread()
    waiting: defaultdict[str, dict[int, Update]] = defaultdict(dict)
    for pair in pairs:
        made = places.assembly(pair.module)
        if made is None or not made.known or pair.embedding:
            done.left.append(pair)
        elif made.kind == "rows":
            waiting[made.names[0]][made.position] = pair
        else:
            _apart(pair, made, places, done)
    for name, parts in waiting.items():
        first = next(iter(parts.values()))
        made = places.assembly(first.module)
        count = made.parts if made else 1
        heights = [places.base.tensors[name].shape[0] // count] * count
        module = name.removesuffix(_WEIGHT)
        done.pairs.append(
            factors.fuse_rows([parts.get(place) for place in range(count)], heights, module)
        )
        done.sources[module] = tuple(parts[place].module for place in sorted(parts))
    return done


def _apart(pair: Update, made: Assembly, places: Places, done: Spread) -> None:
    """Cut an update into those of the tensors that a weight is put together from."""
    experts = made.experts()
    stacked = pair.kind is Kind.EXPERTS
    if (pair.shape[0] if stacked else 1) != len(experts):
        done.left.append(pair)
        return
    each = factors.unstack_experts(pair, [pair.module] * len(experts)) if stacked else [pair]
    for one, names in zip(each, experts, strict=True):
        start = 0
        for name in names:
            stop = start + places.base.tensors[name].shape[0]
            module = name.removesuffix(_WEIGHT)
            done.pairs.append(factors.renamed(factors.slice_rows(one, start, stop), module))
            done.sources[module] = (pair.module,)
            start = stop
