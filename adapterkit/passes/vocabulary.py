"""Vocabularies that a base file trims or pads.

Checkpoints pad their embedding to a round number of rows; converters cut that padding off, or add
some. A module of the embedding or of the output is padded to them, all of its tensors alike, so
that the new rows are the base's, and cut where the rows that the base does not have hold nothing.
Rows that hold something are somebody's new tokens, or what training did to padding: they leave only
where that is allowed. DoRA whose magnitudes are norms over the rows is another update on a table of
other rows, and stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.advice import MERGE_AND_CONVERT
from adapterkit.base.places import vocabulary_rows
from adapterkit.keys import Role, TensorKey
from adapterkit.notes import Loss, Note, NoteKind, first_and_more
from adapterkit.passes.protocol import Context, Passed
from adapterkit.passes.rows import Module, rows_of

if TYPE_CHECKING:
    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.tensor import LazyTensor

# Padding rounds up to a multiple of at most this; a larger difference is another vocabulary.
_LARGEST_PADDING = 1024
_LOST = "or leave them out with --allow-lossy"
_OWN_ROWS = (
    "the adapter carries these: merge it into the Hugging Face base, which then has them "
    f"{MERGE_AND_CONVERT}, {_LOST}"
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
    beside: dict[TensorKey, LazyTensor] = {}
    left: set[TensorKey] = set()
    notes, losses = list(said.notes), list(said.losses)
    for pair in adapter.pairs():
        rows = vocabulary_rows(pair.module, context.base)
        stored = rows_of(pair)
        if rows is None or rows == stored or _grows(adapter, pair, rows, context):
            continue
        if abs(rows - stored) >= _LARGEST_PADDING:
            continue
        module = Module(adapter, pair)
        if loss := _lost(module, rows, context.base):
            losses.append(loss)
            if not context.allow_lossy:
                continue
        if loss and loss.drops:
            left |= set(loss.drops)
            continue
        update, others = module.resized(rows, context.base)
        resized.append(update)
        beside |= others
        verb = "cut" if rows < stored else "padded with zeros"
        change = f"vocabulary {verb} from {stored} to the base's {rows} rows"
        notes.append(Note(change, NoteKind.VOCABULARY, pair.module))
    if left:
        kept = {key: tensor for key, tensor in adapter.tensors.items() if key not in left}
        adapter = adapter.replace(tensors=kept)
    changed = adapter.updated(resized, beside) if resized else adapter
    return Passed(changed, (*notes,), (*losses,))


def _lost(module: Module, rows: int, base: BaseModel) -> Loss | None:
    """Return why a module cannot be brought to the base's rows, or what it would lose by that.

    A loss that drops something leaves the whole module out.
    """
    if reason := module.fixed(rows, base):
        message = f"has {module.rows} rows, the base {rows}, and {reason}; {_OTHER_BASE}"
        return Loss("vocabulary", module.name, message, module.keys)
    if rows < module.rows and module.holds(rows):
        carried = bool(_carried(module.adapter, module.name, module.rows, base))
        return _loss(module, rows, carried=carried)
    return None


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
    stored = rows_of(pair)
    if not context.growing or context.base is None or rows >= stored:
        return False
    copies = _carried(adapter, pair.module, stored, context.base)
    held = any(bool(copy.rows(rows, copy.shape[0]).numpy().any()) for copy in copies)
    return bool(copies) and (held or Module(adapter, pair).holds(rows))


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


def _loss(module: Module, rows: int, *, carried: bool) -> Loss:
    what = "an update" if module.changes(rows) else "numbers in its frozen copy (base_layer)"
    message = (
        f"its {module.rows} rows are more than the base's {rows}, and the others hold {what}; "
        f"{_ways(carried=carried)}"
    )
    return Loss("vocabulary", module.name, message)
