"""DoRA's magnitudes in the rows of the tensor that a base stores.

A magnitude belongs to a row of ΔW. Wherever a family's tables move, split, stack or fuse rows, the
update m · 1 of rank one goes the same way, and what it is there says which magnitude each row has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.errors import UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.merging.into.steps import Magnitude
from adapterkit.model import Kind
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from adapterkit.merging.planning import Source
    from adapterkit.model import Update


def column_magnitude_of(source: Source, pair: Update) -> Magnitude | None:
    """Return the magnitudes by column of a module, or None if it has none.

    Raises:
        UnsupportedError: if it has not one number for each input.
    """
    found = source.adapter.tensors.get(TensorKey(pair.module, Role.COLUMN_MAGNITUDE))
    if found is None:
        return None
    if pair.kind not in {Kind.LINEAR, Kind.CONVOLUTION} or found.shape != pair.a.shape[1:2]:
        raise UnsupportedError(
            f"has DoRA magnitudes by column of shape {list(found.shape)}, and A of "
            f"{list(pair.a.shape)}",
            path=source.label,
            where=pair.module,
        )
    return Magnitude(found, by_column=True)


def magnitude_of(source: Source, pair: Update) -> LazyTensor | None:
    """Return the magnitude of a module, or None if it is no DoRA.

    Raises:
        UnsupportedError: if it has not one number for each output.
    """
    found = source.adapter.tensors.get(TensorKey(pair.module, Role.MAGNITUDE))
    if found is None:
        return None
    rows = pair.b.shape[:-1] if pair.kind is Kind.EXPERTS else pair.b.shape[:1]
    if found.size != np.prod(rows):
        raise UnsupportedError(
            f"has a DoRA magnitude of shape {list(found.shape)}, and B of {list(pair.b.shape)}",
            path=source.label,
            where=pair.module,
        )
    return LazyTensor(found.dtype, rows, found.read)


def moved_magnitudes(
    source: Source,
    pairs: Sequence[Update],
    move: Callable[[Iterable[Update]], Iterable[Update]],
) -> dict[str, Magnitude]:
    """Return the magnitudes by the module that `move` brings their rows to.

    Args:
        source: the adapter.
        pairs: its updates, by Hugging Face module; embeddings, whose rows are inputs, aside.
        move: what becomes of updates in the base's layout.

    Raises:
        UnsupportedError: if rows become columns on the way, or there are some by column.
    """
    for pair in pairs:
        if column_magnitude_of(source, pair):
            raise UnsupportedError(
                "has DoRA magnitudes by column, and the base keeps its weight in other rows; merge "
                "it into the model's own checkpoint",
                path=source.label,
                where=pair.module,
            )
    held = {pair.module: magnitude_of(source, pair) for pair in pairs if not pair.embedding}
    if not any(held.values()):
        return {}
    markers = [_marker(pair, held[pair.module]) for pair in pairs if pair.module in held]
    values = {pair.module: _rows(source, pair) for pair in move(markers)}
    ones = [replace(m, b=m.b.map(np.ones_like)) if held[m.module] else m for m in markers]
    covered = {pair.module: _rows(source, pair) != 0 for pair in move(ones)}
    return {
        module: Magnitude(LazyTensor.of(rows), None if covered[module].all() else covered[module])
        for module, rows in values.items()
        if covered[module].any()
    }


def _marker(pair: Update, magnitude: LazyTensor | None) -> Update:
    """Return m · 1, or 0 · 1 where there is no magnitude, in the shape of an update."""
    stack = pair.shape[:1] if pair.kind is Kind.EXPERTS else ()
    inputs, outputs = pair.a.shape[-1], pair.b.shape[len(stack)]
    b_shape = (*stack, outputs, 1)
    b = np.zeros(b_shape) if magnitude is None else magnitude.numpy().astype(np.float64)
    return replace(
        pair,
        a=LazyTensor.of(np.ones((*stack, 1, inputs))),
        b=LazyTensor.of(b.reshape(b_shape)),
        scale=1.0,
    )


def _rows(source: Source, pair: Update) -> np.ndarray[Any, Any]:
    """Return what stands in each row: (out,), or (E, out) of stacked experts."""
    a, b = pair.a.numpy(), pair.b.numpy() * pair.scale
    if not np.isin(a, (0, 1)).all():
        raise UnsupportedError(
            f"has a DoRA magnitude, whose rows are columns of {pair.module} in the base; merge it "
            "into the Hugging Face model and convert that",
            path=source.label,
            where=pair.module,
        )
    return b.sum(axis=-1)
