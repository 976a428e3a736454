"""Vocabularies that a base file trims or pads.

Checkpoints pad their embedding to a round number of rows; converters cut that padding off, or add
some. An update of the embedding or of the output is cut or padded with zeros alike: rows that the
base does not have can never be looked up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule
from adapterkit.notes import Note, NoteKind

if TYPE_CHECKING:
    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.tensor import LazyTensor

# Padding rounds up to a multiple of at most this; a larger difference is another vocabulary.
_LARGEST_PADDING = 1024


def matched(
    adapter: AdapterTensorSet, base: BaseModel
) -> tuple[AdapterTensorSet, tuple[Note, ...]]:
    """Return the adapter with the base's vocabulary rows, and what was cut or padded."""
    resized: list[Update] = []
    notes: list[Note] = []
    for pair in adapter.pairs():
        rows = _base_rows(pair, base)
        stored = pair.a.shape[-1] if pair.embedding else pair.b.shape[-2]
        if rows is None or rows == stored or abs(rows - stored) >= _LARGEST_PADDING:
            continue
        resized.append(_fitted(pair, rows))
        verb = "cut" if rows < stored else "padded with zeros"
        change = f"vocabulary {verb} from {stored} to the base's {rows} rows"
        notes.append(Note(change, NoteKind.VOCABULARY, pair.module))
    return (adapter.updated(resized), tuple(notes)) if notes else (adapter, ())


def _base_rows(pair: Update, base: BaseModel) -> int | None:
    match = find_rule(base.architecture, pair.module)
    if match is None or match.rule.shape[:1] != ("vocab",):
        return None
    name = match.rule.targets[0].name if base.kind == "gguf" else pair.module
    if stored := base.tensors.get(f"{name}.weight"):
        return stored.shape[0]
    rows = base.sizes.get("vocab")
    return int(rows) if rows is not None else None


def _fitted(pair: Update, rows: int) -> Update:
    if pair.embedding:
        return replace(pair, a=_resized(pair.a, rows, axis=1))
    return replace(pair, b=_resized(pair.b, rows, axis=0))


def _resized(tensor: LazyTensor, size: int, *, axis: int) -> LazyTensor:
    import numpy as np

    extra = size - tensor.shape[axis]
    shape = tuple(size if place == axis else length for place, length in enumerate(tensor.shape))
    if extra < 0:
        return tensor.map(lambda x: x.take(range(size), axis=axis), shape=shape)
    padding = [(0, extra if place == axis else 0) for place in range(2)]
    return tensor.map(lambda x: np.pad(x, padding), shape=shape)
