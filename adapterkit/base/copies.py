"""Frozen copies of a base's tables, as adapters carry them, held against the base's own."""

from __future__ import annotations

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
        return _first(_further(x, y)[:, None])
    found = [_first(x != y)]
    for dtype in _HALVES if found[0] is not None else ():
        found += [_first(_rounded(x, dtype) != y), _first(x != _rounded(y, dtype))]
    return None if None in found else max(row for row in found if row is not None)


def wide_rows(tensor: LazyTensor) -> Array:
    """Return a table in float64; a quantised one decoded."""
    import numpy as np

    plain = tensor.cast(DType.F32) if tensor.dtype.quantised else tensor
    return np.asarray(plain.numpy(), dtype=np.float64)


def _further(x: Array, y: Array) -> Array:
    """Tell which rows are further apart than rounding makes them, (rows,)."""
    import numpy as np

    size = np.maximum(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
    return ~(np.linalg.norm(x - y, axis=1) <= _ROUNDED * size)


def _first(apart: Array) -> int | None:
    rows = apart.any(axis=1)
    return int(rows.argmax()) if rows.any() else None


def _rounded(values: Array, dtype: DType) -> Array:
    import numpy as np

    with np.errstate(all="ignore"):
        return values.astype(dtype.numpy()).astype(np.float64)
