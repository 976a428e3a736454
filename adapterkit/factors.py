"""What happens to the factors when rows, columns or experts of a weight are moved.

Every function takes updates in factored form and returns the factors of the moved update, lazily:
rows of ΔW are rows of B, columns of ΔW are columns of A. None of them forms B · A.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.model import Kind
from adapterkit.tensor import LazyTensor

# Two quotients alpha / rank that differ by less are one number that was rounded twice.
_SAME = 1e-12

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from adapterkit.model import Update

    Index = np.ndarray[Any, np.dtype[np.intp]]
    Values = np.ndarray[Any, np.dtype[np.float64]]


def take_rows(pair: Update, index: Index) -> Update:
    """Return the update whose rows are `index` of this one's: rows of B move, A stays."""
    shape = (*pair.b.shape[:-2], len(index), pair.b.shape[-1])
    return replace(pair, b=pair.b.map(lambda b: b[..., index, :], shape=shape))


def take_columns(pair: Update, index: Index) -> Update:
    """Return the update whose columns are `index` of this one's: columns of A move, B stays."""
    shape = (*pair.a.shape[:-1], len(index))
    return replace(pair, a=pair.a.map(lambda a: a[..., index], shape=shape))


def renamed(pair: Update, module: str) -> Update:
    """Return the same update under another name."""
    return replace(pair, module=module)


def slice_rows(pair: Update, start: int, stop: int) -> Update:
    """Return rows `start` to `stop` of the update; A is shared."""
    shape = (*pair.b.shape[:-2], stop - start, pair.b.shape[-1])
    return replace(pair, b=pair.b.map(lambda b: b[..., start:stop, :], shape=shape))


def scaled(pair: Update, factor: float) -> Update:
    """Return the same update with `factor` moved from the scale into B: B · factor, scale / factor.

    A factor of 1 keeps the bits. The product is computed in float64 and rounded once.
    """
    if factor == 1.0:
        return pair
    return replace(
        pair, scale=pair.scale / factor, b=pair.b.map(lambda b: b.astype("float64") * factor)
    )


def scale_rows(pair: Update, given: Values) -> Update:
    """Return the update with each row times its factor, (rows,), in B.

    B becomes float32, so that the products of narrower types are not rounded to them.
    """
    scaled_b = pair.b.map(lambda b: b.astype("float64") * given[:, None], dtype=DType.F32)
    return replace(pair, b=scaled_b)


def with_scale(pair: Update, scale: float) -> Update:
    """Return the same update at another scale: what is left over goes into B.

    Unless the leftover is a power of two, which rounds nothing in a type with float32's exponents,
    that B becomes float32, so that folding costs nothing. A scale of 0 becomes a B of zeros.
    """
    factor = pair.scale / scale
    if abs(factor - 1) < _SAME:
        return replace(pair, scale=scale)
    if not pair.scale:
        return replace(pair, scale=scale, b=pair.b.map(lambda b: b * 0))
    power_of_two = math.frexp(abs(factor))[0] == 0.5  # noqa: PLR2004  (the mantissa of one)
    if power_of_two and pair.b.dtype is not DType.F16:
        return replace(scaled(pair, factor), scale=scale)
    widened = pair.b.map(lambda b: b.astype("float64") * factor, dtype=DType.F32)
    return replace(pair, scale=scale, b=widened)


def padded(pair: Update, rank: int) -> Update:
    """Return the same update with zero rows in A and zero columns in B, up to `rank`."""
    import numpy as np

    if rank == pair.rank:
        return pair
    a_shape, b_shape = pair.factor_shapes(rank)

    def grown(values: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        more = ((0, new - old) for old, new in zip(values.shape, shape, strict=True))
        return np.pad(values, tuple(more))

    return replace(
        pair,
        a=pair.a.map(lambda a: grown(a, a_shape), shape=a_shape),
        b=pair.b.map(lambda b: grown(b, b_shape), shape=b_shape),
    )


def stack_experts(pairs: Sequence[Update | None], module: str) -> Update:
    """Return one (E, out, in) update from one per expert; a missing expert is a zero update.

    Ranks are padded to the largest, and scales are brought to the first expert's, in B.
    """
    present = [pair for pair in pairs if pair is not None]
    first = present[0]
    rank = max(pair.rank for pair in present)
    scale = next((pair.scale for pair in present if pair.scale), 0.0)
    ready = [None if pair is None else padded(_rescaled(pair, scale), rank) for pair in pairs]
    return replace(
        first,
        module=module,
        a=_stacked([p and p.a for p in ready], (rank, first.a.shape[-1]), _dtype(present, "a")),
        b=_stacked([p and p.b for p in ready], (first.b.shape[0], rank), _dtype(present, "b")),
        scale=scale,
        kind=Kind.EXPERTS,
    )


def unstack_experts(pair: Update, names: Sequence[str]) -> list[Update]:
    """Return one update per expert of a stacked one, under `names`."""
    return [
        replace(
            pair,
            module=name,
            a=pair.a.map(lambda a, e=expert: a[e], shape=pair.a.shape[1:]),
            b=pair.b.map(lambda b, e=expert: b[e], shape=pair.b.shape[1:]),
            kind=Kind.LINEAR,
        )
        for expert, name in enumerate(names)
    ]


def fuse_rows(pairs: Sequence[Update | None], heights: Sequence[int], module: str) -> Update:
    """Return one update whose rows are those of the parts, in order; a missing part is zero rows.

    Where all parts share one A, as after a split, the fused update keeps it and its rank. Otherwise
    the A are stacked and B is block-diagonal: the rank is the sum, the update is exact.

    Args:
        pairs: the parts, None for an absent one.
        heights: rows of each part.
        module: name of the fused update.
    """
    present = [pair for pair in pairs if pair is not None]
    if _same_a(present):
        return _fuse_shared(pairs, heights, module)
    return _fuse_blocks(pairs, heights, module)


def split_heads(pair: Update, heads: int) -> Update:
    """Return a stack (heads, rows / heads, in) from (rows, in): A is shared by all heads."""
    import numpy as np

    rows, rank = pair.b.shape
    a_shape, b_shape = (heads, *pair.a.shape), (heads, rows // heads, rank)
    return replace(
        pair,
        a=pair.a.map(lambda a: np.broadcast_to(a, a_shape), shape=a_shape),
        b=pair.b.map(lambda b: b.reshape(b_shape), shape=b_shape),
        kind=Kind.EXPERTS,
    )


def join_heads(pair: Update) -> Update:
    """Undo `split_heads`: one A if all heads share it, else the heads' own, stacked."""
    heads, height, _ = pair.b.shape
    parts = unstack_experts(pair, [pair.module] * heads)
    return fuse_rows(parts, [height] * heads, pair.module)


def concatenated(pairs: Sequence[Update]) -> Update:
    """Return the sum of updates of one module: factors side by side, ranks add up, exactly.

    Scales are brought to the first non-zero one, in B.
    """
    first = pairs[0]
    scale = next((pair.scale for pair in pairs if pair.scale), 1.0)
    ready = [with_scale(pair, scale) for pair in pairs]
    rank = sum(pair.rank for pair in ready)
    (a_shape, b_shape), (a_axis, b_axis) = first.factor_shapes(rank), first.rank_axes
    return replace(
        first,
        a=_joined([pair.a for pair in ready], a_shape, _dtype(ready, "a"), axis=a_axis),
        b=_joined([pair.b for pair in ready], b_shape, _dtype(ready, "b"), axis=b_axis),
        scale=scale,
    )


def _joined(
    parts: Sequence[LazyTensor], shape: tuple[int, ...], dtype: DType, *, axis: int
) -> LazyTensor:
    def read() -> memoryview:
        import numpy as np

        from adapterkit.tensor import encode

        arrays = [part.numpy().astype(dtype.numpy()) for part in parts]
        return encode(np.concatenate(arrays, axis=axis), dtype)

    return LazyTensor(dtype, shape, read)


def transposed(pair: Update) -> Update:
    """Return the update turned on its last two axes: the factors swap, each turned."""
    return replace(pair, a=turned(pair.b), b=turned(pair.a))


def turned(tensor: LazyTensor) -> LazyTensor:
    """Return a tensor with its last two axes exchanged."""
    shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
    return tensor.map(lambda x: x.swapaxes(-1, -2), shape=shape)


def _rescaled(pair: Update, scale: float) -> Update:
    if pair.scale == scale:
        return pair
    if not scale:
        return replace(pair, scale=scale)
    return replace(scaled(pair, pair.scale / scale), scale=scale)


def _dtype(pairs: Sequence[Update], factor: str) -> DType:
    kinds = {getattr(pair, factor).dtype for pair in pairs}
    return kinds.pop() if len(kinds) == 1 and not next(iter(kinds)).quantised else DType.F32


def _stacked(
    parts: Sequence[LazyTensor | None], shape: tuple[int, ...], dtype: DType
) -> LazyTensor:
    def read() -> memoryview:
        import numpy as np

        from adapterkit.tensor import encode

        zero = np.zeros(shape, dtype.numpy())
        return encode(
            np.stack(
                [zero if part is None else part.numpy().astype(dtype.numpy()) for part in parts]
            ),
            dtype,
        )

    return LazyTensor(dtype, (len(parts), *shape), read)


def _same_a(pairs: Sequence[Update]) -> bool:
    first, *rest = pairs
    if any((pair.a.dtype, pair.a.shape) != (first.a.dtype, first.a.shape) for pair in rest):
        return False
    wanted = bytes(first.a.tobytes())
    return all(bytes(pair.a.tobytes()) == wanted for pair in rest)


def _fuse_shared(pairs: Sequence[Update | None], heights: Sequence[int], module: str) -> Update:
    present = [pair for pair in pairs if pair is not None]
    first = present[0]
    scale = next((pair.scale for pair in present if pair.scale), 0.0)
    ready = [None if pair is None else _rescaled(pair, scale) for pair in pairs]
    dtype = _dtype(present, "b")
    lead, rank = first.b.shape[:-2], first.rank

    def read() -> memoryview:
        import numpy as np

        from adapterkit.tensor import encode

        blocks = [
            np.zeros((*lead, height, rank), dtype.numpy())
            if pair is None
            else pair.b.numpy().astype(dtype.numpy())
            for pair, height in zip(ready, heights, strict=True)
        ]
        return encode(np.concatenate(blocks, axis=-2), dtype)

    b = LazyTensor(dtype, (*lead, sum(heights), rank), read)
    return replace(first, module=module, b=b, scale=scale)


def _fuse_blocks(pairs: Sequence[Update | None], heights: Sequence[int], module: str) -> Update:
    present = [pair for pair in pairs if pair is not None]
    first = present[0]
    scale = next((pair.scale for pair in present if pair.scale), 0.0)
    ready = [None if pair is None else _rescaled(pair, scale) for pair in pairs]
    rank = sum(pair.rank for pair in present)
    a_type, b_type = _dtype(present, "a"), _dtype(present, "b")
    lead, columns = first.b.shape[:-2], first.a.shape[-1]

    def read_a() -> memoryview:
        import numpy as np

        from adapterkit.tensor import encode

        rows = [pair.a.numpy().astype(a_type.numpy()) for pair in present]
        return encode(np.concatenate(rows, axis=-2), a_type)

    def read_b() -> memoryview:
        import numpy as np

        from adapterkit.tensor import encode

        block = np.zeros((*lead, sum(heights), rank), b_type.numpy())
        row = column = 0
        for pair, height in zip(ready, heights, strict=True):
            if pair is not None:
                block[..., row : row + height, column : column + pair.rank] = pair.b.numpy()
                column += pair.rank
            row += height
        return encode(block, b_type)

    return replace(
        first,
        module=module,
        a=LazyTensor(a_type, (*lead, rank, columns), read_a),
        b=LazyTensor(b_type, (*lead, sum(heights), rank), read_b),
        scale=scale,
    )
