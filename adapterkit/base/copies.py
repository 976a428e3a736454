"""Frozen copies of a base's tables, as adapters carry them, held against the base's own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adapterkit.architectures.mapping import find_rule
from adapterkit.base.places import EMBEDDING, OUTPUT, Places
from adapterkit.dtype import DType
from adapterkit.keys import Role
from adapterkit.notes import Loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet
    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[Any]]

_WEIGHT = ".weight"
# Elements that are compared at a time.
_COMPARED = 1 << 22
_HALVES = (DType.BF16, DType.F16)
# Share of a row that no quantisation of it is off by.
_ROUNDED = 0.5
# Numbers that share a scale, of types whose quantisers end with the nearest step of that scale,
# whatever weights they chose it with; those of Q4_0 and its kin do not if they were given weights.
_GRIDS = {
    DType.Q8_0: 32,
    DType.Q2_K: 16,
    DType.Q3_K: 16,
    DType.Q4_K: 32,
    DType.Q5_K: 32,
    DType.Q6_K: 16,
}
# Share of such a row that no quantisation of it is off by, but one that leaves nothing of it.
_LEFT = 0.99
# Numbers that vanish in blocks whose scale of scales is a float16.
_VANISHED = 2.0**-13
# Share of a number by which bfloat16 on the way to both is off, and what scales in float16 are.
_HALVED, _LEAST = 2.0**-8, 2.0**-18


def table_of(module: str, base: BaseModel) -> LazyTensor | None:
    """Return the base's weight that an adapter's frozen copy of a module is one of.

    A tied output's is the embedding. None where the base has no numbers for it: it is a config
    alone, has no such module, or stores it packed in a way that only its own program undoes.
    """
    name = _in_gguf(module, base) if base.kind == "gguf" else _in_directory(module, base)
    table = base.tensors.get(name or "")
    if table is None or table.dtype.scaled:
        return None
    return table if table.dtype.floating or table.dtype.quantised else None


def _in_directory(module: str, base: BaseModel) -> str | None:
    places, parameter = Places(base), module + _WEIGHT
    if base.tied and places.role(parameter) is not None:
        return places.embedding
    return places.find(parameter)


def _in_gguf(module: str, base: BaseModel) -> str | None:
    match = find_rule(base.architecture, module)
    if match is None:
        return None
    name = match.rule.targets[0].name
    tied = name == OUTPUT and OUTPUT + _WEIGHT not in base.tensors
    return (EMBEDDING if tied else name) + _WEIGHT


def lost_copies(adapter: AdapterTensorSet, base: BaseModel | None) -> Iterator[Loss]:
    """Yield the frozen copies that a target has no place for: none is an update.

    Those that are not the base's own are losses of the pass that compares them.
    """
    for key in adapter.tensors:
        if key.role is Role.BASE_COPY:
            message = "frozen copy of the base left out"
            if base is None or table_of(key.module, base) is None:
                message += "; it was not compared with the base's own: give its weights with --base"
            yield Loss("base-copy", key.module, message, blocks=False)


def first_other_row(one: LazyTensor, other: LazyTensor, begin: int, end: int) -> int | None:
    """Return the first of some rows that differs, or None.

    A table that was loaded, or saved, in 16 bits is the same table, and so is a quantised one as
    far as its rounding tells.
    """
    step = max(1, _COMPARED // max(1, one.shape[-1]))
    for start in range(begin, end, step):
        stop = min(start + step, end)
        parts = [tensor.rows(start, stop) for tensor in (one, other)]
        row = _first_apart(*parts)
        if row is not None:
            return start + row
    return None


def _first_apart(one: LazyTensor, other: LazyTensor) -> int | None:
    if one.dtype is other.dtype and bytes(one.tobytes()) == bytes(other.tobytes()):
        return None
    x, y = wide_rows(one), wide_rows(other)
    if one.dtype.quantised or other.dtype.quantised:
        apart = _further(x, y, _LEFT if {one.dtype, other.dtype} & _GRIDS.keys() else _ROUNDED)
        for tensor, plain, decoded in ((one, y, x), (other, x, y)):
            if tensor.dtype in _GRIDS:
                apart |= _off_grid(plain, decoded, _GRIDS[tensor.dtype])
        return _first(apart[:, None])
    found = [_first(x != y)]
    for dtype in _HALVES if found[0] is not None else ():
        found += [_first(_rounded(x, dtype) != y), _first(x != _rounded(y, dtype))]
    return None if None in found else max(row for row in found if row is not None)


def wide_rows(tensor: LazyTensor) -> Array:
    """Return a table in float64; a quantised one decoded."""
    import numpy as np

    plain = tensor.cast(DType.F32) if tensor.dtype.quantised else tensor
    return np.asarray(plain.numpy(), dtype=np.float64)


def _further(x: Array, y: Array, share: float) -> Array:
    """Tell which rows are further apart than a share of the larger, (rows,)."""
    import numpy as np

    size = np.maximum(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
    return ~(np.linalg.norm(x - y, axis=1) <= share * size + _VANISHED * math.sqrt(x.shape[1]))


def _off_grid(x: Array, decoded: Array, block: int) -> Array:
    """Tell which rows hold a number that is not the nearest step of its block, (rows,).

    The step is at most the smallest gap between two numbers of the block. What is beyond the
    largest or the smallest of them may have been cut off there.
    """
    import numpy as np

    plain, steps = (each.reshape(len(each), -1, block) for each in (x, decoded))
    gaps = np.diff(np.sort(steps, axis=-1), axis=-1)
    gaps[gaps <= 0] = np.inf
    half = gaps.min(axis=-1, keepdims=True) / 2
    half = half + _HALVED * np.maximum(np.abs(plain), np.abs(steps)) + _LEAST
    above = (plain - steps > half) & (steps < steps.max(axis=-1, keepdims=True))
    below = (steps - plain > half) & (steps > steps.min(axis=-1, keepdims=True))
    return (above | below).any(axis=(1, 2))


def _first(apart: Array) -> int | None:
    rows = apart.any(axis=1)
    return int(rows.argmax()) if rows.any() else None


def _rounded(values: Array, dtype: DType) -> Array:
    import numpy as np

    with np.errstate(all="ignore"):
        return values.astype(dtype.numpy()).astype(np.float64)
