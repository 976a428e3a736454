"""Rules on the entries of updates: which entries of each are kept, and how the kept ones combine.

A rule sees blocks of whole rows, one after the other and top to bottom; no update is ever held as
a whole. What a pruner needs to know of all entries, it learns in passes of its own beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from adapterkit.errors import UsageError
from adapterkit.lowrank.operators import Plane
from adapterkit.lowrank.products import Array, Key, LowRank

if TYPE_CHECKING:
    from numpy.typing import NDArray

Parameters: TypeAlias = Mapping[str, float | None]
Filter: TypeAlias = Callable[[Array], Array]
# Starts a pass from the top row; called again for every pass.
Start: TypeAlias = Callable[[], Filter]
# Blocks of all updates, pruned together.
Selection: TypeAlias = Callable[[Sequence[Array]], Sequence[Array]]

# Entries of a block: 2 MB of float64, what stays in the cache between its uses.
BLOCK = 1 << 18
# Up to this many candidates are ranked by sorting.
_SORTABLE = 1 << 21
_DIGIT = 16
_TIE = 1e-9


@dataclass(frozen=True, slots=True)
class Rule:
    """An elementwise method.

    Attributes:
        pruner: `f(update, parameters, key)` returns a function that starts a pass; that returns one
            that takes the next rows of the update and returns them pruned.
        combine: takes the pruned blocks of all updates and the weights, returns the merged block.
        selection: `f(updates, parameters)` returns a function of the blocks of all updates, which
            are pruned together before each is pruned alone; None where nothing is.
        weigh: `f(blocks, weights)` returns other weights, from all pruned blocks of all updates.
    """

    pruner: Callable[[LowRank, Parameters, Key], Start]
    combine: Callable[[Sequence[Array], Array], Array]
    selection: Callable[[Sequence[LowRank], Parameters], Selection] | None = None
    weigh: Callable[[Iterable[Sequence[Array]], Array], Array] | None = None


def blocks(update: LowRank, height: int | None = None) -> Iterator[Array]:
    """Yield the rows of B · A from top to bottom, `BLOCK` entries (or one row) at a time.

    With `height`, so many rows at a time.
    """
    rows, columns = update.shape
    height = height or max(BLOCK // max(columns, 1), 1)
    for start in range(0, rows, height):
        yield update.b[start : start + height] @ update.a


def merged(
    updates: Sequence[LowRank],
    weights: Array,
    rule: Rule,
    parameters: Parameters,
    keys: Sequence[Key],
) -> Plane:
    """Return the plane that an elementwise rule makes of updates of one shape."""
    return planned(updates, weights, rule, parameters, keys).held()


def planned(
    updates: Sequence[LowRank],
    weights: Array,
    rule: Rule,
    parameters: Parameters,
    keys: Sequence[Key],
    height: int | None = None,
) -> Plane:
    """Return the plane of `merged`, computed anew in every pass, `height` rows at a time."""
    starts = [rule.pruner(u, parameters, key) for u, key in zip(updates, keys, strict=True)]
    select = rule.selection(updates, parameters) if rule.selection else None

    def pruned() -> Iterator[Sequence[Array]]:
        filters = [start() for start in starts]
        for rows in zip(*(blocks(update, height) for update in updates), strict=True):
            chosen = select(rows) if select else rows
            yield [keep(block) for keep, block in zip(filters, chosen, strict=True)]

    shares = rule.weigh(pruned(), weights) if rule.weigh else weights
    return Plane(updates[0].shape, lambda: (rule.combine(each, shares) for each in pruned()))


def weighted_sum(pruned: Sequence[Array], weights: Array) -> Array:
    """Σ wᵢ xᵢ."""
    total = weights[0] * pruned[0]
    for block, weight in zip(pruned[1:], weights[1:], strict=True):
        total += weight * block
    return total


def elected_mean(pruned: Sequence[Array], weights: Array) -> Array:
    """The weighted mean of the entries whose sign wins, times Σ|w|.

    The sign of Σ wᵢxᵢ is elected, and each entry becomes Σ|w| · Σ wᵢxᵢ / Σ|wᵢ|, both sums over the
    updates that agree with it and are not zero there. With weights 1 / T this is the disjoint mean
    of Yadav et al. (2023), "TIES-merging"; updates that agree everywhere give the weighted sum.
    Entries that cancel elect no sign and become 0.
    """
    weighted = [weight * block for weight, block in zip(weights, pruned, strict=True)]
    return _agreeing_mean(weighted, weights, weighted)


def elected_sum(pruned: Sequence[Array], weights: Array) -> Array:
    """Σ wᵢxᵢ of the entries whose sign wins, as mergekit has it where it does not normalise."""
    weighted = [weight * block for weight, block in zip(weights, pruned, strict=True)]
    sign = _elected(weighted)
    return sum((np.where(x * sign > 0, x, 0.0) for x in weighted), np.zeros_like(weighted[0]))


def erased_mean(pruned: Sequence[Array], weights: Array) -> Array:
    """`elected_mean` with one vote for each update, whatever its weight (SCE)."""
    weighted = [weight * block for weight, block in zip(weights, pruned, strict=True)]
    return _agreeing_mean(weighted, weights, pruned)


def _agreeing_mean(weighted: Sequence[Array], weights: Array, votes: Sequence[Array]) -> Array:
    sign = _elected(votes)
    total = np.zeros_like(weighted[0])
    shares = np.zeros_like(weighted[0])
    for block, weight in zip(weighted, weights, strict=True):
        agrees = block * sign > 0
        total += np.where(agrees, block, 0.0)
        shares += abs(weight) * agrees
    shares[shares == 0] = 1.0
    return total * (float(np.abs(weights).sum()) / shares)


def _elected(votes: Sequence[Array]) -> Array:
    """Return numbers of the sign that wins, 0 where none does."""
    elected = sum(votes[1:], votes[0])
    # A sum of opposites is rounding, whose sign is chance.
    cast = sum((np.abs(block) for block in votes[1:]), np.abs(votes[0]))
    return np.where(np.abs(elected) > _TIE * cast, elected, 0.0)


def largest(update: LowRank, parameters: Parameters, key: Key) -> Start:
    """Keep the `density` largest entries by magnitude; all of several equal ones at the limit."""
    del key
    size = math.prod(update.shape)
    limit = nth_largest(update, _kept(parameters, size))
    return lambda: lambda block: np.where(np.abs(block) >= limit, block, 0.0)


def without_outliers(update: LowRank, parameters: Parameters, key: Key) -> Start:
    """Drop the `gamma` largest entries and the smallest, so that `density` of all are left.

    Davari and Belilovsky (2024), "Model breadcrumbs". As in mergekit, fewer of the largest are
    dropped where `density` and `gamma` together are more than all.
    """
    del key
    size = math.prod(update.shape)
    kept = int(_density(parameters) * size)
    top = min(int((parameters.get("gamma") or 0.0) * size), size - kept)
    upper = nth_largest(update, top)
    lower = nth_largest(update, top + kept)

    def keep(block: Array) -> Array:
        magnitude = np.abs(block)
        return np.where((magnitude >= lower) & (magnitude < upper), block, 0.0)

    return lambda: keep


def whole(update: LowRank, parameters: Parameters, key: Key) -> Start:
    """Keep everything."""
    del update, parameters, key
    return lambda: lambda block: block


def of_most_variance(updates: Sequence[LowRank], parameters: Parameters) -> Selection:
    """Keep, in all updates, the `density` of the entries in which they differ most.

    Wan et al. (2024), "FuseChat", SCE; the share is of the entries whose variance is not 0.
    """
    density = _density(parameters)
    if density >= 1:
        return lambda rows: rows

    def variances() -> Iterator[Array]:
        for rows in zip(*(blocks(update) for update in updates), strict=True):
            yield np.var(rows, axis=0)

    there = sum(int(np.count_nonzero(block)) for block in variances())
    limit = nth_largest_of(variances, math.prod(updates[0].shape), int(there * density))

    def select(rows: Sequence[Array]) -> Sequence[Array]:
        chosen = np.var(rows, axis=0) >= limit
        return [np.where(chosen, block, 0.0) for block in rows]

    return select


def by_energy(pruned: Iterable[Sequence[Array]], weights: Array) -> Array:
    """Return weights in proportion to Σx² of what each update keeps; their sum stays (SCE)."""
    squares = np.zeros(len(weights))
    for rows in pruned:
        squares += [float(np.vdot(block, block)) for block in rows]
    shares = weights * squares
    total = float(shares.sum())
    return shares / total * float(weights.sum()) if total else weights


def at_random(update: LowRank, parameters: Parameters, key: Key) -> Start:
    """Keep each entry with probability `density`, divided by it (Yu et al. 2024, DARE)."""
    del update
    density = _density(parameters)

    def start() -> Filter:
        generator = _generator(key)
        return lambda block: np.where(generator.random(block.shape) < density, block / density, 0.0)

    return start


def at_random_by_rank(update: LowRank, parameters: Parameters, key: Key) -> Start:
    """Keep entries with a probability that grows with their rank in the row, divided by it.

    Deep et al. (2024), "DELLA-merging": it runs from density - epsilon for the smallest magnitude
    of a row to density + epsilon for the largest.
    """
    density = _density(parameters)
    reach = parameters.get("epsilon") or 0.0
    if not (reach < density <= 1 - reach) and density < 1:
        raise UsageError(
            f"della keeps entries with probability {density:g} ± {reach:g}, which must lie between "
            "0 and 1; lower epsilon"
        )
    columns = update.shape[1]
    steps = np.linspace(-reach, reach, columns) if columns > 1 else np.zeros(columns)
    chances = np.minimum(density + steps, 1.0) if density < 1 else np.ones(columns)

    def start() -> Filter:
        generator = _generator(key)

        def keep(block: Array) -> Array:
            order = np.argsort(np.abs(block), axis=1, kind="stable")
            chance = np.empty_like(block)
            np.put_along_axis(chance, order, np.broadcast_to(chances, block.shape), axis=1)
            return np.where(generator.random(block.shape) < chance, block / chance, 0.0)

        return keep

    return start


def _kept(parameters: Parameters, size: int) -> int:
    """Return how many entries a density keeps: cut off as mergekit and PEFT do, one at least."""
    return max(int(_density(parameters) * size), 1)


def _density(parameters: Parameters) -> float:
    value = parameters.get("density")
    return 1.0 if value is None else value


def _generator(key: Key) -> np.random.Generator:
    # Counter-based: the numbers depend on the key and the entry, on no other module or thread.
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))


def nth_largest(update: LowRank, place: int) -> float:
    """Return the magnitude at a place, counted from 1 at the largest, of all entries of B · A."""
    return nth_largest_of(lambda: blocks(update), math.prod(update.shape), place)


def nth_largest_of(read: Callable[[], Iterator[Array]], size: int, place: int) -> float:
    """Return the magnitude at a place, counted from 1 at the largest, of all of `size` entries.

    Place 0 gives infinity. Exact: digits of 16 bits of the float64 pattern are counted, from the
    top, until the candidates that share them are few enough to sort.
    """
    if place <= 0:
        return math.inf
    if place >= size:
        return 0.0
    prefix, shift, candidates = 0, 64, size
    while candidates > _SORTABLE and shift:
        shift -= _DIGIT
        counts = np.zeros(1 << _DIGIT, dtype=np.int64)
        for bits in _patterns(read, prefix, shift + _DIGIT):
            digits = (bits >> shift) & ((1 << _DIGIT) - 1)
            counts += np.bincount(digits, minlength=counts.size)
        above = counts[::-1].cumsum()[::-1]
        digit = int(np.flatnonzero(above >= place)[-1])
        candidates = int(counts[digit])
        place -= int(above[digit]) - candidates
        prefix = (prefix << _DIGIT) | digit
    if not shift:
        return float(np.array(prefix, dtype=np.int64).view(np.float64))
    found = np.concatenate(list(_patterns(read, prefix, shift))).view(np.float64)
    return float(np.partition(found, found.size - place)[found.size - place])


def _patterns(
    read: Callable[[], Iterator[Array]], prefix: int, shift: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the bits of all magnitudes that start with a prefix; they order as the numbers do."""
    for block in read():
        bits = np.abs(block).reshape(-1).view(np.int64)
        yield bits if shift >= 64 else bits[(bits >> shift) == prefix]  # noqa: PLR2004  (all bits)


TIES = Rule(largest, elected_mean)
DARE = Rule(at_random, weighted_sum)
DARE_TIES = Rule(at_random, elected_mean)
DELLA = Rule(at_random_by_rank, elected_mean)
DELLA_LINEAR = Rule(at_random_by_rank, weighted_sum)
BREADCRUMBS = Rule(without_outliers, weighted_sum)
BREADCRUMBS_TIES = Rule(without_outliers, elected_sum)
SCE = Rule(whole, erased_mean, of_most_variance, by_energy)
MAGNITUDE_PRUNE = Rule(largest, weighted_sum)
