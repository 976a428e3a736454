"""Vocabularies that a base file trims or pads.

Checkpoints pad their embedding to a round number of rows; converters cut that padding off, or add
some. An update of the embedding or of the output is padded with zeros alike, and cut where the rows
that the base does not have hold no update. Rows that hold one are somebody's new tokens, or what
training did to padding: they leave only where that is allowed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.base.places import vocabulary_rows
from adapterkit.keys import Role, TensorKey
from adapterkit.notes import Loss, Note, NoteKind, first_and_more
from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.tensor import LazyTensor

# Padding rounds up to a multiple of at most this; a larger difference is another vocabulary.
_LARGEST_PADDING = 1024
_LOST = "or leave them out with --allow-lossy"
_OWN_ROWS = (
    "the adapter carries these: merge it into the Hugging Face base, which then has them "
    "(adapterkit merge --into DIRECTORY), and make a GGUF of that with llama.cpp's "
    f"convert_hf_to_gguf.py, {_LOST}"
)
_OTHER_BASE = (
    "give the base with the vocabulary of the training (saved after resize_token_embeddings), "
    f"{_LOST}"
)


def matched(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the adapter with the base's vocabulary rows, and what was cut or padded.

    A table with an update in rows that the base lacks is a loss: it stays as it is, or is cut if
    the context allows that. Where the target grows, a table whose rows the adapter carries is none.
    """
    if context.base is None:
        return Passed(adapter)
    said = _tokens_matched(adapter, context.base, context)
    adapter = said.adapter
    resized: list[Update] = []
    notes, losses = list(said.notes), list(said.losses)
    for pair in adapter.pairs():
        rows = vocabulary_rows(pair.module, context.base)
        stored = pair.a.shape[-1] if pair.embedding else pair.b.shape[-2]
        if rows is None or rows == stored or _grows(adapter, pair, rows, context):
            continue
        if abs(rows - stored) >= _LARGEST_PADDING:
            continue
        if rows < stored and _holds_update(pair, rows):
            carried = bool(_carried(adapter, pair.module, stored, context.base))
            losses.append(_loss(pair, stored, rows, carried=carried))
            if not context.allow_lossy:
                continue
        resized.append(_fitted(pair, rows))
        verb = "cut" if rows < stored else "padded with zeros"
        change = f"vocabulary {verb} from {stored} to the base's {rows} rows"
        notes.append(Note(change, NoteKind.VOCABULARY, pair.module))
    return Passed(adapter.updated(resized) if resized else adapter, (*notes,), (*losses,))


def _tokens_matched(adapter: AdapterTensorSet, base: BaseModel, context: Context) -> Passed:
    """Return the adapter without rows of tokens that the base has not, and what was left out."""
    notes: list[Note] = []
    losses: list[Loss] = []
    for key, tensor in adapter.tensors.items():
        rows = vocabulary_rows(key.module, base) if key.role is Role.TOKEN_ROWS else None
        tokens = adapter.tokens_of(key.module)
        if rows is None or len(tokens) != tensor.shape[0] or max(tokens, default=-1) < rows:
            continue
        beyond = [token for token in tokens if token >= rows]
        carried = bool(_carried(adapter, key.module, max(beyond) + 1, base))
        if context.growing and carried:
            continue
        names = first_and_more([*map(str, beyond)], 8)
        message = (
            f"its rows of tokens {names} are beyond the base's {rows}; {_ways(carried=carried)}"
        )
        losses.append(Loss("vocabulary", key.module, message))
        if context.allow_lossy:
            adapter = _without_tokens(adapter, key, rows)
            change = f"rows of tokens {names} left out: the base has {rows}"
            notes.append(Note(change, NoteKind.VOCABULARY, key.module))
    return Passed(adapter, (*notes,), (*losses,))


def _without_tokens(adapter: AdapterTensorSet, key: TensorKey, rows: int) -> AdapterTensorSet:
    tokens = adapter.tokens_of(key.module)
    kept = [place for place, token in enumerate(tokens) if token < rows]
    left = tuple(tokens[place] for place in kept)
    held = adapter.tensors[key]
    cut = held.map(lambda x: x[kept], shape=(len(kept), *held.shape[1:]))
    tensors = {name: cut if name == key else each for name, each in adapter.tensors.items()}
    if not kept:
        del tensors[key]
    if isinstance(adapter.token_indices, tuple):
        return adapter.replace(tensors=tensors, token_indices=left)
    named = adapter.token_indices.items()
    indices = {name: left if f".{key.module}".endswith(f".{name}") else t for name, t in named}
    return adapter.replace(tensors=tensors, token_indices=indices)


def _grows(adapter: AdapterTensorSet, pair: Update, rows: int, context: Context) -> bool:
    """Tell whether the target takes the rows that the base lacks from the adapter.

    Rows that hold neither an update nor anything of the table are padding.
    """
    stored = pair.a.shape[-1] if pair.embedding else pair.b.shape[-2]
    if not context.growing or context.base is None or rows >= stored:
        return False
    copies = _carried(adapter, pair.module, stored, context.base)
    held = any(bool(copy.rows(rows, copy.shape[0]).numpy().any()) for copy in copies)
    return bool(copies) and (held or _holds_update(pair, rows))


def _carried(
    adapter: AdapterTensorSet, module: str, rows: int, base: BaseModel
) -> list[LazyTensor]:
    """Return frozen copies of a module's table with so many rows; tied tables are one."""
    return [
        tensor
        for key, tensor in adapter.tensors.items()
        if key.role is Role.BASE_COPY
        and tensor.shape[0] >= rows
        and (key.module == module or base.tied)
        and vocabulary_rows(key.module, base) is not None
    ]


def _ways(*, carried: bool) -> str:
    return _OWN_ROWS if carried else _OTHER_BASE


def _loss(pair: Update, stored: int, rows: int, *, carried: bool) -> Loss:
    message = (
        f"its {stored} rows are more than the base's {rows}, and the others hold an update; "
        f"{_ways(carried=carried)}"
    )
    return Loss("vocabulary", pair.module, message)


def _holds_update(pair: Update, rows: int) -> bool:
    """Tell whether any row from `rows` on is changed: ΔW of a row is its row of the outer factor.

    What is not finite counts as a change.
    """
    values = pair.a.numpy()[:, rows:] if pair.embedding else pair.b.numpy()[rows:]
    return bool(values.any())


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
