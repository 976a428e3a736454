"""All tensors of one module with a row for each token, resized together or not at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.base.copies import table_of, wide_rows
from adapterkit.dtype import DType
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet, Update

if TYPE_CHECKING:
    from typing import Any

    import numpy as np

    from adapterkit.base.model import BaseModel
    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[Any]]

_MAGNITUDES = (Role.MAGNITUDE, Role.COLUMN_MAGNITUDE)


def rows_of(pair: Update) -> int:
    """Return the rows of the table that an update is one of."""
    return pair.a.shape[-1] if pair.embedding else pair.b.shape[-2]


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of an adapted embedding or output.

    Attributes:
        adapter: where they are.
        update: its factors.
    """

    adapter: AdapterTensorSet
    update: Update

    @property
    def name(self) -> str:
        """Path of the module."""
        return self.update.module

    @property
    def rows(self) -> int:
        """Rows that its factors have."""
        return rows_of(self.update)

    @property
    def keys(self) -> tuple[TensorKey, ...]:
        """Every tensor of the module."""
        return tuple(key for key in self.adapter.tensors if key.module == self.name)

    def fixed(self, rows: int, base: BaseModel) -> str:
        """Return why the module can have no other rows; empty if it can."""
        held = {key.role for key in self.keys}
        norms = set(_MAGNITUDES) if self.update.embedding else {Role.COLUMN_MAGNITUDE}
        if held & norms:
            return "its DoRA magnitudes are norms over all rows, so that no row stands for itself"
        if rows <= self.rows or not held & {Role.MAGNITUDE, Role.BASE_COPY}:
            return ""
        table = table_of(self.name, base)
        if table is None:
            return "what stands in the others follows from the base's weights, which are not there"
        new = wide_rows(table.rows(self.rows, rows))
        if Role.MAGNITUDE in held and not (new**2).sum(axis=1).all():
            return "DoRA divides by the norm of each row, which is 0 in the others"
        return ""

    def holds(self, rows: int) -> bool:
        """Tell whether any row from `rows` on is changed, or is one of a table.

        What is not finite counts as a change.
        """
        copy = self.adapter.tensors.get(TensorKey(self.name, Role.BASE_COPY))
        kept = copy is not None and bool(copy.rows(rows, copy.shape[0]).numpy().any())
        return kept or self.changes(rows)

    def changes(self, rows: int) -> bool:
        """Tell whether any row from `rows` on has an update: ΔW of a row is its outer factor's.

        So is a magnitude: whether it is the norm that the row had, only the trained table tells.
        """
        if self.update.embedding:
            return bool(self.update.a.numpy()[:, rows:].any())
        keys = [TensorKey(self.name, role) for role in (Role.LORA_BIAS, Role.MAGNITUDE)]
        beside = [self.adapter.tensors[key] for key in keys if key in self.adapter.tensors]
        return any(bool(each.numpy()[rows:].any()) for each in (self.update.b, *beside))

    def resized(self, rows: int, base: BaseModel) -> tuple[Update, dict[TensorKey, LazyTensor]]:
        """Return the update and what stands beside it with other rows.

        New rows of the factors and of a bias are zeros; those of a frozen copy are the base's, and
        those of a magnitude the norms of the base's, with which DoRA changes nothing.
        """
        others: dict[TensorKey, LazyTensor] = {}
        for key in self.keys:
            tensor = self.adapter.tensors[key]
            if key.role is Role.LORA_BIAS:
                others[key] = _fitted(tensor, rows, axis=0)
            elif key.role in {Role.MAGNITUDE, Role.BASE_COPY}:
                others[key] = _with_base(key, tensor, rows, base)
        if self.update.embedding:
            return replace(self.update, a=_fitted(self.update.a, rows, axis=1)), others
        return replace(self.update, b=_fitted(self.update.b, rows, axis=0)), others


def _with_base(key: TensorKey, tensor: LazyTensor, rows: int, base: BaseModel) -> LazyTensor:
    have = tensor.shape[0]
    if rows <= have:
        return _fitted(tensor, rows, axis=0)
    table = table_of(key.module, base)
    if table is None:
        raise AssertionError("`fixed` has looked for it")

    def longer(values: Array) -> Array:
        import numpy as np

        new = wide_rows(table.rows(have, rows))
        if key.role is Role.MAGNITUDE:
            new = np.linalg.norm(new, axis=1).reshape(-1, *values.shape[1:])
        return np.concatenate([values.astype(np.float64), new])

    wide = DType.F64 if tensor.dtype is DType.F64 else DType.F32
    dtype = tensor.dtype if tensor.dtype is table.dtype else wide
    return tensor.map(longer, shape=(rows, *tensor.shape[1:]), dtype=dtype)


def _fitted(tensor: LazyTensor, size: int, *, axis: int) -> LazyTensor:
    import numpy as np

    extra = size - tensor.shape[axis]
    shape = tuple(size if place == axis else length for place, length in enumerate(tensor.shape))
    if extra < 0:
        return tensor.map(lambda x: x.take(range(size), axis=axis), shape=shape)
    padding = [(0, extra if place == axis else 0) for place in range(len(tensor.shape))]
    return tensor.map(lambda x: np.pad(x, padding), shape=shape)
