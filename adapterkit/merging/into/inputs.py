"""What is known of the inputs of a base's weights, for the rounding of changes to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.base.activations import activations, computable
from adapterkit.containers.gguf import GGUFArray
from adapterkit.merging.into.steps import Shaping
from adapterkit.quantisation.shaped import ROUNDS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.containers.gguf import GGUFFile
    from adapterkit.tensor import LazyTensor

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Weighting:
    """Weights beside the adapter's own orthonormal directions, measured in docs/rounding.md.

    Attributes:
        others: of every direction.
        moments: of the second moments of inputs.
        first: of the first token's direction.
        eigenvectors: of the moments, that are directions of their own.
        rounds: of scales and levels; what is better known is worth more of them.
    """

    others: float
    moments: float
    first: float
    eigenvectors: int
    rounds: int


# For tokens that the base draws itself, and for those of a text.
DRAWN = Weighting(0.15, 0.1, 5.0, 16, ROUNDS)
TEXT = Weighting(0.1, 0.3, 5.0, 32, 4)
# In the moments, the weight of first tokens beside all others.
SINK = 0.3
_ITERATIONS = 6
# Sequences that are drawn, tokens in each, and the first that is no special one, about.
_SEQUENCES, _LENGTH, _LOWEST = 4, 64, 20
_ROWS = 1 << 12
_TINY = 1e-30
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


def unknown_inputs(columns: int) -> Shaping:
    """Return what counts where nothing is known: every input as much as any."""
    none = np.zeros((0, columns))
    return Shaping(none, np.zeros(columns), none, DRAWN.others)


def drawn_inputs(base: BaseModel, file: GGUFFile, names: Collection[str]) -> dict[str, Shaping]:
    """Return what counts, by name, for tokens that the base itself draws; no text is needed.

    The first token has a direction of its own: every later one attends to it, and its vectors are
    much longer than others, so that an error along them is in all of the output.

    Args:
        base: a GGUF model; without a result where its forward pass is not known here.
        file: with the tokenizer's metadata.
        names: of weights.
    """
    token = first_token(file)
    if token is None or not names or not computable(base):
        return {}
    return seen_inputs(base, names, _drawn(base, token), DRAWN)


def seen_inputs(
    base: BaseModel,
    names: Collection[str],
    sequences: Sequence[Sequence[int]],
    weighting: Weighting,
) -> dict[str, Shaping]:
    """Return what counts, by name, for some tokens; the base is `computable`."""
    found: dict[str, Shaping] = {}
    for seen, vectors in activations(base, sequences):
        if wanted := set(names) & set(seen):
            found |= dict.fromkeys(wanted, moments(vectors, weighting))
        if len(found) == len(names):
            break
    return found


def _drawn(base: BaseModel, token: int) -> list[list[int]]:
    """Return sequences of tokens: each drawn as the base continues those of a first draft.

    The draft is drawn by Zipf's law, to which the numbers of a vocabulary's tokens come close. One
    pass over it is a sample of the base's words, if not of its sentences.
    """
    random = np.random.default_rng(0)
    count = base.tensors[_EMBEDDING].shape[0]
    low, high = np.log(min(_LOWEST, count - 1)), np.log(count)
    drafts = np.exp(random.uniform(low, high, (_SEQUENCES, _LENGTH))).astype(int)
    drafts[:, 0] = token
    table = base.tensors.get(_OUTPUT) or base.tensors[_EMBEDDING]
    states: list[Array] = []
    for seen, vectors in activations(base, drafts.tolist()):
        if _OUTPUT in seen:
            states = vectors
    found = _sampled(np.concatenate(states), table, random).reshape(drafts.shape)
    return [[token, *row[:-1]] for row in found.tolist()]


def _sampled(states: Array, table: LazyTensor, random: np.random.Generator) -> Array:
    """Return a token for each state, drawn by the softmax of its logits (Gumbel's way)."""
    best = np.full(len(states), -np.inf)
    token = np.zeros(len(states), int)
    for start in range(0, table.shape[0], _ROWS):
        rows = table.rows(start, min(start + _ROWS, table.shape[0])).numpy()
        scores = states @ rows.T.astype(np.float32)
        scores = scores + random.gumbel(size=scores.shape)
        place = scores.argmax(1)
        most = scores[np.arange(len(states)), place]
        token = np.where(most > best, start + place, token)
        best = np.maximum(most, best)
    return token


def first_token(file: GGUFFile) -> int | None:
    """Return the token that texts for a model begin with, as far as its metadata tells.

    That of the chat template, where it is no mark of the beginning by itself; else that mark.
    """
    begin = file.metadata.get("tokenizer.ggml.bos_token_id")
    template = str(file.metadata.get("tokenizer.chat_template", ""))
    added = file.metadata.get("tokenizer.ggml.add_bos_token")
    if added is not True and "<|im_start|>" in template:
        held = file.metadata.get("tokenizer.ggml.tokens")
        names: Sequence[object] = list(held) if isinstance(held, GGUFArray) else []
        if "<|im_start|>" in names:
            return names.index("<|im_start|>")
    return begin if isinstance(begin, int) else None


def moments(vectors: Sequence[Array], weighting: Weighting) -> Shaping:
    """Return second moments, as their first eigenvectors and the diagonal of the rest.

    Args:
        vectors: (tokens, columns) of each sequence, from its first token on.
        weighting: what counts how much.
    """
    first = np.concatenate([x[:1] for x in vectors])
    later = np.concatenate([x[1:] for x in vectors])
    # First tokens are few, long, and seen by all others.
    weight = (SINK * max(len(later), 1) / len(first)) ** 0.5
    rows = np.concatenate([later, weight * first]).astype(np.float64)
    rows *= (rows.shape[1] / max(float(np.square(rows).sum()), _TINY)) ** 0.5
    basis = _leading(rows, min(weighting.eigenvectors, *rows.shape))
    _, values, turned = np.linalg.svd(rows @ basis, full_matrices=False)
    most = values[:, None] * (turned @ basis.T)
    rest = np.maximum(np.square(rows).sum(0) - np.square(most).sum(0), 0)
    own = first.mean(0, keepdims=True, dtype=np.float64)
    own *= weighting.first**0.5 / max(float(np.linalg.norm(own)), _TINY)
    most *= weighting.moments**0.5
    return Shaping(most, weighting.moments * rest, own, weighting.others, weighting.rounds)


def _leading(rows: Array, count: int) -> Array:
    """Return an orthonormal basis of about the first right singular vectors, (columns, k)."""
    basis = np.random.default_rng(0).standard_normal((rows.shape[1], count))
    for _ in range(_ITERATIONS):
        basis, _ = np.linalg.qr(rows.T @ (rows @ basis))
    return basis
