"""Rows of an update moved, with the magnitudes and biases that stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.factors import fuse_rows, slice_rows, with_scale
from adapterkit.keys import Role
from adapterkit.model import Kind, Update
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Moved:
    """An update and what it has one number a row of.

    Attributes:
        update: factors.
        others: MAGNITUDE and LORA_BIAS, (out,), which go with the rows; COLUMN_MAGNITUDE (in,).
    """

    update: Update
    others: Mapping[Role, LazyTensor]


def moved(whole: Moved, shares: Sequence[int], order: Sequence[int] | None = None) -> list[Moved]:
    """Cut the rows in shares: one update each, or all of them joined again in another order.

    A is shared by the pieces, rows of B are theirs: nothing is rounded.

    Raises:
        ValueError: if the rows cannot be shared so.
    """
    rows, unit = whole.update.matrix_shape[0], sum(shares)
    if rows % unit:
        raise ValueError(f"has {rows} rows, which are no multiple of {unit}")
    if order is None and len(shares) > 1:
        _check_columns([whole])
    flat = matrix(whole.update)
    edges = [0]
    for share in shares:
        edges.append(edges[-1] + share * rows // unit)
    spans = list(pairwise(edges))
    if order is None:
        return [
            Moved(slice_rows(flat, *span), {r: _span(t, *span) for r, t in whole.others.items()})
            for span in spans
        ]
    chosen = [spans[place] for place in order]
    b = _chosen(flat.b, chosen)
    others = {
        role: tensor if role is Role.COLUMN_MAGNITUDE else _chosen(tensor, chosen)
        for role, tensor in whole.others.items()
    }
    return [Moved(replace(flat, b=b), others)]


def joined(parts: Sequence[Moved | None], shares: Sequence[int]) -> Moved:
    """Stack the rows of some parts; of an absent one they are zero.

    Scales are brought to the first that is not zero, in B, which rounds nothing.

    Raises:
        ValueError: if the parts disagree on the rows of a share or on their inputs.
    """
    present = [(part, share) for part, share in zip(parts, shares, strict=True) if part]
    _check_columns([part for part, _ in present])
    units = {part.update.matrix_shape[0] / share for part, share in present}
    inputs = {part.update.matrix_shape[1] for part, _ in present}
    if len(units) > 1 or len(inputs) > 1 or not next(iter(units)).is_integer():
        shown = ", ".join(str(list(part.update.matrix_shape)) for part, _ in present)
        raise ValueError(f"updates of {shown} do not make up one of a fused module")
    unit = int(units.pop())
    scale = next((part.update.scale for part, _ in present if part.update.scale), 1.0)
    ready = [part and rescaled(replace(part, update=matrix(part.update)), scale) for part in parts]
    heights = [share * unit for share in shares]
    updates = [part and part.update for part in ready]
    update = fuse_rows(updates, heights, present[0][0].update.module)
    roles = dict.fromkeys(role for part, _ in present for role in part.others)
    return Moved(update, {role: _stacked(role, ready, heights) for role in roles})


def _check_columns(parts: Sequence[Moved]) -> None:
    """Refuse DoRA by column of a layer with parts: a norm of all rows is none of theirs."""
    if any(Role.COLUMN_MAGNITUDE in part.others for part in parts):
        raise ValueError(
            "has DoRA magnitudes for each column, whose norm is that of all rows of a fused layer; "
            "merge it into its base where it was trained"
        )


def rescaled(whole: Moved, scale: float) -> Moved:
    """Return the same update at another scale; a bias on B is under it too."""
    factor = whole.update.scale / scale
    others = dict(whole.others)
    if factor != 1.0 and (bias := others.get(Role.LORA_BIAS)):
        others[Role.LORA_BIAS] = bias.map(lambda x: x.astype("float64") * factor, dtype=DType.F32)
    return Moved(with_scale(whole.update, scale), others)


def _stacked(role: Role, parts: Sequence[Moved | None], heights: Sequence[int]) -> LazyTensor:
    tensors = [part.others.get(role) if part else None for part in parts]
    present = [tensor for tensor in tensors if tensor is not None]
    dtype = present[0].dtype

    def read() -> memoryview:
        import numpy as np

        from adapterkit.tensor import encode

        zero = [np.zeros(height, dtype.numpy()) for height in heights]
        rows = [z if t is None else t.numpy() for t, z in zip(tensors, zero, strict=True)]
        return encode(np.concatenate(rows), dtype)

    return LazyTensor(dtype, (sum(heights),), read)


def matrix(update: Update) -> Update:
    """Return a convolution of kernel size 1 as the linear layer that it is.

    Raises:
        ValueError: for other convolutions: none is fused with another.
    """
    if update.kind is not Kind.CONVOLUTION:
        return update
    a, b = update.a.shape, update.b.shape
    if update.matrix_shape[1] != a[1]:
        raise ValueError(f"has a kernel of shape {list(a[2:])}; a fused layer has none")
    return replace(
        update,
        a=update.a.map(lambda x: x.reshape(a[:2]), shape=a[:2]),
        b=update.b.map(lambda x: x.reshape(b[:2]), shape=b[:2]),
        kind=Kind.LINEAR,
    )


def _span(tensor: LazyTensor, begin: int, end: int) -> LazyTensor:
    return tensor.map(lambda x: x[begin:end], shape=(end - begin,))


def _chosen(tensor: LazyTensor, spans: Sequence[tuple[int, int]]) -> LazyTensor:
    def rows(array: Array) -> Array:
        import numpy as np

        return np.concatenate([array[begin:end] for begin, end in spans])

    return tensor.map(rows)
