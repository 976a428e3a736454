"""A base whose tables grow to the vocabulary that an adapter was trained with.

PEFT saves the frozen tables under an adapted embedding or output: of a vocabulary that was resized
they are the only place where the new rows are. The grown base is the one that was trained on, so
everything after this adds to it as to any other.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from adapterkit.base.copies import first_other_row
from adapterkit.dtype import DType
from adapterkit.errors import IncompatibleBaseError, UnsupportedError
from adapterkit.keys import Role
from adapterkit.passes.protocol import Context
from adapterkit.passes.registry import by_name
from adapterkit.tensor import LazyTensor, RowReader, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from adapterkit.base.model import BaseModel
    from adapterkit.base.places import Places
    from adapterkit.merging.planning import Source
    from adapterkit.storage import FileSlice

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Copy:
    """A frozen copy of a table that an adapter carries.

    Attributes:
        label: the adapter.
        module: the table, as the adapter names it.
        tensor: (rows, width).
    """

    label: str
    module: str
    tensor: LazyTensor


@dataclass(frozen=True, slots=True)
class Lengthened(RowReader):
    """Rows of the base, then those that an adapter carries, as one type that holds both exactly."""

    first: LazyTensor
    then: LazyTensor
    dtype: DType

    @property
    def path(self) -> Path:
        """The base's file."""
        return cast("FileSlice | RowReader", self.first.read).path

    @property
    def stored(self) -> DType:
        """The base's type."""
        return self.first.dtype

    def __call__(self) -> memoryview:
        """Return all rows."""
        return self.rows(0, self.first.shape[0] + self.then.shape[0])

    def rows(self, begin: int, end: int) -> memoryview:
        """Return some rows."""
        have = self.first.shape[0]
        parts = (
            self.first.rows(min(begin, have), min(end, have)),
            self.then.rows(max(begin, have) - have, max(end, have) - have),
        )
        found = [encode(part.numpy(), self.dtype) for part in parts if part.shape[0]]
        return found[0] if len(found) == 1 else memoryview(b"".join(found))


def grown(sources: Sequence[Source], names: Places) -> tuple[list[Source], dict[str, LazyTensor]]:
    """Return the adapters fitted to the grown tables, and those tables by stored name.

    Raises:
        IncompatibleBaseError: if a frozen copy is one of another base.
        UnsupportedError: if two adapters carry other new rows.
    """
    tables: dict[str, LazyTensor] = {}
    for name, copies in _copies(sources, names).items():
        stored = names.base.tensors[name]
        for copy in copies:
            _check_same(copy, stored, name)
        longest = max(copies, key=lambda copy: copy.tensor.shape[0])
        if _adds(longest.tensor, stored) or _wanted(sources, name, names) > stored.shape[0]:
            for copy in copies:
                _check_alike(copy, longest, stored.shape[0])
            tables |= {
                each: _lengthened(names.base.tensors[each], longest.tensor)
                for each in (name, *_stored_twice(name, names))
            }
    if not tables:
        return list(sources), tables
    base = replace(names.base, tensors={**names.base.tensors, **tables})
    return [_fitted(source, base) for source in sources], tables


def _copies(sources: Sequence[Source], names: Places) -> Mapping[str, list[Copy]]:
    """Return the frozen copies of each stored table that has rows for tokens."""
    found: dict[str, list[Copy]] = defaultdict(list)
    for source in sources:
        for key, tensor in source.adapter.tensors.items():
            name = _table(key.module, names) if key.role is Role.BASE_COPY else None
            stored = names.base.tensors.get(name or "")
            fits = stored and stored.dtype.floating and tensor.shape[1:] == stored.shape[1:]
            if name and fits:
                found[name].append(Copy(source.label, key.module, tensor))
    return found


def _table(module: str, names: Places) -> str | None:
    """Return the stored table of a module; a tied output's is the embedding."""
    parameter = f"{module}.weight"
    if names.role(parameter) is None:
        return None
    return names.embedding if names.base.tied else names.find(parameter)


def _stored_twice(name: str, names: Places) -> list[str]:
    """Return the output that a checkpoint of tied tables stores beside the embedding, if any."""
    if not names.base.tied or name != names.embedding:
        return []
    return [each for each in names.base.tensors if names.role(each) == "output"]


def _wanted(sources: Sequence[Source], name: str, names: Places) -> int:
    """Return how many rows the updates of a table have, at most."""
    return max(
        (
            rows
            for source in sources
            for module, rows in _rows(source)
            if _table(module, names) == name
        ),
        default=0,
    )


def _rows(source: Source) -> Iterator[tuple[str, int]]:
    for pair in source.adapter.pairs():
        yield pair.module, pair.a.shape[-1] if pair.embedding else pair.b.shape[-2]
    for key in source.adapter.tensors:
        if key.role is Role.TOKEN_ROWS:
            yield key.module, max(source.adapter.tokens_of(key.module), default=-1) + 1


def _adds(copy: LazyTensor, stored: LazyTensor) -> bool:
    """Tell whether a copy has rows below the base's last that are no padding."""
    have, rows = stored.shape[0], copy.shape[0]
    return rows > have and bool(copy.rows(have, rows).numpy().any())


def _lengthened(stored: LazyTensor, copy: LazyTensor) -> LazyTensor:
    have, rows = stored.shape[0], copy.shape[0]
    both = {stored.dtype, copy.dtype}
    wide = DType.F64 if DType.F64 in both else DType.F32
    dtype = stored.dtype if len(both) == 1 else wide
    read = Lengthened(stored, copy.rows(have, rows), dtype)
    return LazyTensor(dtype, copy.shape, read)


def _check_same(copy: Copy, stored: LazyTensor, name: str) -> None:
    """Refuse a copy whose rows are not the base's."""
    common = min(copy.tensor.shape[0], stored.shape[0])
    row = first_other_row(copy.tensor, stored, 0, common)
    if row is not None:
        raise IncompatibleBaseError(
            f"its frozen copy (base_layer) has another row {row} than {name} of the base: it was "
            "trained on another base",
            path=copy.label,
            where=copy.module,
        )


def _check_alike(copy: Copy, other: Copy, have: int) -> None:
    """Refuse new rows that are not those of another copy."""
    common = min(copy.tensor.shape[0], other.tensor.shape[0])
    row = first_other_row(copy.tensor, other.tensor, have, common)
    if row is not None:
        raise UnsupportedError(
            f"carries another row {row} than {other.module} of {other.label}: their new tokens are "
            "not the same, and no vocabulary holds both",
            path=copy.label,
            where=copy.module,
        )


def _fitted(source: Source, base: BaseModel) -> Source:
    """Return an adapter of fewer rows padded to the grown tables."""
    done = by_name("vocabulary").change(source.adapter, Context(base=base))
    return replace(source, adapter=done.adapter)
