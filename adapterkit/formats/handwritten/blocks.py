"""Factors that a library folds up, written out: fused layers, convolutions, stacked updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.architectures.expressions import evaluate
from adapterkit.errors import FormatError, UsageError
from adapterkit.factors import scaled, slice_rows
from adapterkit.formats.handwritten.dialects import builtin
from adapterkit.model import Kind, Update
from adapterkit.tables import whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from adapterkit.formats.handwritten.dialects import Dialect, Document
    from adapterkit.formats.handwritten.dialects.grammar import BlockRule
    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[Any]]

_ON = (True, 1, "true", "True")
_SIZE = whole(1, 1 << 40)


@dataclass(frozen=True, slots=True)
class Slots:
    """The rows of a fused layer.

    Attributes:
        names: slots in the order of their rows.
        heights: rows of each.
        pairs: update of each enabled slot.
        apart: whether each slot is a layer of its own, as its rows need not lie in one piece.
    """

    names: tuple[str, ...]
    heights: tuple[int, ...]
    pairs: Mapping[str, Update]
    apart: bool = False


def unfolded(pair: Update, rule: BlockRule, dialect: Dialect, document: Document) -> Slots | None:
    """Return the update of each enabled slot, None for a layer that is not folded.

    A holds `r` rows for every enabled slot and B that slot's own rows, both in the order of the
    slots; slots that are not enabled have no update.

    Raises:
        UsageError: if neither file nor dialect says which slots are enabled.
        FormatError: if a file beside this one is missing, or the rows do not divide.
    """
    rank = pair.b.shape[1]
    if not rank:
        return None  # an empty factor, which is said of it elsewhere
    count = pair.a.shape[0] // rank
    enabled = _enabled(rule, dialect, document, pair.module)
    if enabled is None:
        if count == 1:
            return None
        if count < len(rule.slots):
            raise _mask_needed(rule, dialect, document, pair.module, count)
        enabled = rule.slots
    if count != len(enabled):
        if count == 1 and rule.sizes is None:
            return None
        raise FormatError(
            f"holds updates for {count} slots, where {', '.join(enabled) or 'none'} are enabled",
            path=document.path,
            where=pair.module,
        )
    heights = _heights(rule, document, pair, enabled)
    pairs: dict[str, Update] = {}
    row = 0
    for place, slot in enumerate(enabled):
        height = heights[rule.slots.index(slot)]
        part = slice_rows(pair, row, row + height)
        pairs[slot] = replace(part, a=_rows(pair.a, place * rank, (place + 1) * rank))
        row += height
    return Slots(rule.slots, heights, pairs)


def _rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    return tensor.map(lambda x: x[start:stop], shape=(stop - start, *tensor.shape[1:]))


def _enabled(
    rule: BlockRule, dialect: Dialect, document: Document, module: str
) -> tuple[str, ...] | None:
    if isinstance(rule.enabled, tuple):
        return rule.enabled or None
    values = {slot: document.value(source) for slot, source in rule.enabled.items()}
    if missing := next((slot for slot, value in values.items() if value is None), None):
        raise FormatError(
            f"which of {', '.join(rule.slots)} are adapted is in {rule.enabled[missing]}, which is "
            f"not there; put that file beside this one, or name the slots in a dialect file that "
            f'extends "{dialect.name}"',
            path=document.path,
            where=module,
        )
    return tuple(slot for slot in rule.slots if values.get(slot) in _ON)


def _mask_needed(
    rule: BlockRule, dialect: Dialect, document: Document, module: str, count: int
) -> UsageError:
    named = [
        f"--dialect {other.name}"
        for other in builtin()
        if other.extends == dialect.name and any(len(b.enabled) == count for b in other.blocks)
    ]
    own = f'a dialect file that extends "{dialect.name}" and lists the enabled slots'
    return UsageError(
        f"holds updates for {count} of the slots {', '.join(rule.slots)}, and no file says for "
        f"which; pass {', '.join([*named, own])}",
        path=document.path,
        where=module,
    )


def _heights(
    rule: BlockRule, document: Document, pair: Update, enabled: Sequence[str]
) -> tuple[int, ...]:
    rows = pair.b.shape[0]
    if rule.sizes is None:
        heights = (rows // len(enabled),) * len(rule.slots)
    else:
        heights = _computed(rule, document, pair.module)
    used = [heights[rule.slots.index(slot)] for slot in enabled]
    if sum(used) != rows:
        raise FormatError(
            f"has {rows} rows, which {', '.join(enabled)} do not divide as {used}",
            path=document.path,
            where=pair.module,
        )
    return heights


def _computed(rule: BlockRule, document: Document, module: str) -> tuple[int, ...]:
    settings = document.settings(rule.numbers)

    def lookup(name: str) -> int:
        return settings.checked(name, settings.fields[name], _SIZE)

    try:
        sizes = rule.sizes or {}
        return tuple(int(evaluate(sizes[slot], lookup)) for slot in rule.slots)
    except KeyError as error:
        raise FormatError(
            f"its rows divide by {error.args[0]}, which {rule.numbers} does not state; put that "
            "file beside this one",
            path=document.path,
            where=module,
        ) from None
    except ValueError as error:
        raise settings.error(module, f"its rows do not divide by these sizes: {error}") from None


def convolution(pair: Update, kernel: int) -> Update:
    """Write out loralib's factors of a square convolution, ΔW = (B · A).view(out, in, k, k).

    Read row by row, that view is a sum over k blocks: the result has k times as many rows in A,
    (r k², in, k, k), and B is (out, r k², 1, 1). The scale must be that of r, not of its rank.
    """
    import numpy as np

    folded, width = pair.a.shape
    out, inputs = pair.b.shape[0] // kernel, width // kernel
    rank = folded * kernel
    a_shape = (rank, inputs, kernel, kernel)
    b_shape = (out, rank, 1, 1)

    def spread(a: Array) -> Array:
        full = np.zeros((kernel, folded, kernel, width), a.dtype)
        full[np.arange(kernel), :, np.arange(kernel)] = a
        return full.reshape(a_shape)

    return replace(
        pair,
        a=pair.a.map(spread, shape=a_shape),
        b=pair.b.map(lambda b: b.reshape(b_shape), shape=b_shape),
        kind=Kind.CONVOLUTION,
    )


def summed(pairs: Sequence[Update]) -> Update:
    """Return one update that is the sum of several, exactly: A stacked, B side by side."""
    import numpy as np

    first = pairs[0]
    if len(pairs) == 1:
        return first
    scale = next((pair.scale for pair in pairs if pair.scale), 0.0)
    # Without any scale the sum is zero, whichever factors stand for it.
    ready = [scaled(p, p.scale / scale) for p in pairs if p.scale] or [first]
    rank = sum(pair.rank for pair in ready)
    a_shape, b_shape = first.factor_shapes(rank)
    return replace(
        first,
        a=first.a.map(lambda _: np.concatenate([p.a.numpy() for p in ready]), shape=a_shape),
        b=first.b.map(lambda _: np.concatenate([p.b.numpy() for p in ready], 1), shape=b_shape),
        scale=scale,
    )
