"""Vocabularies that a base file trims or pads.

Checkpoints pad their embedding to a round number of rows; converters cut that padding off, or add
some. An update of the embedding or of the output is padded with zeros alike, and cut where the rows
that the base does not have hold no update. Rows that hold one are somebody's new tokens, or what
training did to padding: they leave only where that is allowed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule
from adapterkit.notes import Loss, Note, NoteKind
from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.tensor import LazyTensor

# Padding rounds up to a multiple of at most this; a larger difference is another vocabulary.
_LARGEST_PADDING = 1024


def matched(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the adapter with the base's vocabulary rows, and what was cut or padded.

    A table with an update in rows that the base lacks is a loss: it stays as it is, or is cut if
    the context allows that.
    """
    if context.base is None:
        return Passed(adapter)
    resized: list[Update] = []
    notes: list[Note] = []
    losses: list[Loss] = []
    for pair in adapter.pairs():
        rows = _base_rows(pair, context.base)
        stored = pair.a.shape[-1] if pair.embedding else pair.b.shape[-2]
        if rows is None or rows == stored or abs(rows - stored) >= _LARGEST_PADDING:
            continue
        if rows < stored and _holds_update(pair, rows):
            losses.append(_loss(pair, stored, rows))
            if not context.allow_lossy:
                continue
        resized.append(_fitted(pair, rows))
        verb = "cut" if rows < stored else "padded with zeros"
        change = f"vocabulary {verb} from {stored} to the base's {rows} rows"
        notes.append(Note(change, NoteKind.VOCABULARY, pair.module))
    return Passed(adapter.updated(resized) if notes else adapter, (*notes,), (*losses,))


def _loss(pair: Update, stored: int, rows: int) -> Loss:
    message = (
        f"its {stored} rows are more than the base's {rows}, and the others hold an update; give "
        "the base with the vocabulary of the training, or leave them out with --allow-lossy"
    )
    return Loss("vocabulary", pair.module, message)


def _holds_update(pair: Update, rows: int) -> bool:
    """Tell whether any row from `rows` on is changed: ΔW of a row is its row of the outer factor.

    What is not finite counts as a change.
    """
    values = pair.a.numpy()[:, rows:] if pair.embedding else pair.b.numpy()[rows:]
    return bool(values.any())


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
