"""Rules on the entries of updates, into a base: exact, one block of rows at a time.

A rule's result has no small rank, so a base is the one place that holds it whole. Each stored
tensor is one matrix to it, as it is to a merge of adapters; what a rule has to know of all entries
it learns in passes over the factors, before the first block is written.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.lowrank.products import LowRank, nothing
from adapterkit.merging.combination import Combination, check, keys_of, numbers, seed_of
from adapterkit.merging.elementwise import Drawn
from adapterkit.merging.into.steps import Product, Ruled
from adapterkit.merging.registry import method as find_method

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from adapterkit.lowrank.products import Array as Wide
    from adapterkit.merging.into.rows import Place, Unmerged
    from adapterkit.merging.into.steps import Applied, Step
    from adapterkit.merging.planning import Source

Array = np.ndarray[Any, np.dtype[Any]]

# A sum of weights below this share of their magnitudes is rounding of 0.
_NO_SUM = 1e-12


def rule_of(
    method: str | None, density: float | None, params: Mapping[str, float] | None, seed: int | None
) -> Combination | None:
    """Return the rule of a name; None for the weighted sum, by whichever name.

    Raises:
        UsageError: if the method is no rule on entries, or has no such number.
    """
    spec = find_method(method or "linear")
    how = Combination(
        spec=spec,
        parameters=numbers(spec, density, params),
        space=spec.space,
        seed=seed_of(spec, seed),
        rank=None,
    )
    check(how)
    if spec.sums:
        return None
    if not how.dense:
        raise UsageError(
            f"{spec.name} makes an adapter without a loss: merge the adapters with it first, and "
            "then --into the base"
        )
    return how


def shares(
    weights: Sequence[float] | None, count: int, how: Combination | None, *, normalize: bool
) -> Sequence[float] | None:
    """Return the weights, those that the rule has by default if there are none.

    Raises:
        UsageError: if they are to be divided by their sum, and that is 0.
    """
    if weights is None:
        return [1 / count] * count if normalize or (how is not None and how.spec.mean) else None
    if not normalize:
        return weights
    total = math.fsum(weights)
    if abs(total) <= _NO_SUM * math.fsum(map(abs, weights)):
        raise UsageError("the weights sum to 0, and normalize divides by their sum; leave it out")
    return [weight / total for weight in weights]


def settings_of(how: Combination | None) -> dict[str, Any]:
    """Return what tells one rule from another."""
    if how is None:
        return {}
    return {"method": how.spec.name, "seed": how.seed, **how.parameters}


def ruled(
    steps: Mapping[str, Sequence[Step]], sources: Sequence[Source], how: Combination | None
) -> dict[str, list[Applied]]:
    """Return the steps with all updates of a tensor made one by a rule, if there is one.

    Raises:
        UsageError: if an adapter is given twice, which nothing would tell apart.
        UnsupportedError: if something is no low-rank update of a whole tensor.
    """
    if how is None:
        return {name: list(each) for name, each in steps.items()}
    labels = [source.label for source in sources]
    if len(set(labels)) < len(labels):
        raise UsageError(f"{how.spec.name} takes each adapter once; one path is given twice")
    return {name: [_ruled(each, labels, sources, how)] for name, each in steps.items() if each}


def _ruled(
    steps: Sequence[Step], labels: Sequence[str], sources: Sequence[Source], how: Combination
) -> Ruled:
    products: dict[int, Product] = {}
    for step in steps:
        number = labels.index(step.label)
        fault = None
        if not isinstance(step, Product):
            fault = "holds more than low-rank updates here"
        elif step.magnitude is not None:
            fault = "has a DoRA magnitude, and its update is not low-rank"
        elif step.others or number in products:
            fault = "is stored in one tensor with other modules"
        elif step.turned and how.spec.random:
            fault = "is stored turned, where masks would fall on other entries"
        if fault is not None:
            raise UnsupportedError(
                f"{fault}, and {how.spec.name} works on the entries of one update of each adapter; "
                "merge without --method, or the adapters first",
                path=step.label,
                where=step.module,
            )
        assert isinstance(step, Product)  # noqa: S101  (all else is a fault)
        products[number] = step
    module = next(iter(products.values())).module
    weights = tuple(source.weight_of(module) for source in sources)
    return Ruled(tuple(products.get(n) for n in range(len(sources))), weights, how)


class Rules:
    """ΔW of a rule, some rows at a time, in any order."""

    # It has no small rank, and so no directions of its own.
    products = None

    def __init__(
        self,
        step: Ruled,
        tensor: Unmerged,
        factors: Callable[[Product], tuple[Array, Array]],
    ) -> None:
        """Read the factors, and learn what the rule has to know of all entries.

        Args:
            step: what to do.
            tensor: the tensor that is changed.
            factors: reads (E, rows, r) and (E, r, columns) of an update, its weight left out.
        """
        self.kind = tensor.kind
        stacks = [factors(each) if each is not None else None for each in step.products]
        shape = tensor.rows, tensor.columns
        count = next(len(stack[0]) for stack in stacks if stack is not None)
        self.drawn = [
            self._matrix(
                [
                    nothing(shape) if s is None else LowRank(s[0][place], s[1][place])
                    for s in stacks
                ],
                step,
                place,
            )
            for place in range(count)
        ]

    @staticmethod
    def _matrix(updates: Sequence[LowRank], step: Ruled, place: int) -> Callable[..., Wide]:
        how, weights = step.how, np.array(step.weights)
        keys = keys_of(updates, weights, how, (step.module, place))
        drawn = Drawn(updates, weights, how.spec.function, how.parameters, keys)
        return partial(drawn.rows)

    def delta(self, place: Place, out: Array | None = None) -> Array:
        """Return ΔW of some rows, in `out` if given."""
        found = self.drawn[place.matrix](place.start, place.stop)
        if out is None:
            return found.astype(self.kind)
        np.copyto(out, found, casting="same_kind")
        return out

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        """Add the rows of ΔW."""
        del base
        merged += self.delta(place)
        return merged
