"""What is known of the inputs of a base's weights, for the rounding of changes to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.base.activations import activations, computable
from adapterkit.containers.gguf import GGUFArray
from adapterkit.merging.into.steps import Shaping

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.containers.gguf import GGUFFile

Array = np.ndarray[Any, np.dtype[Any]]

# Weights beside the adapter's own orthonormal directions, measured in docs/rounding.md: of every
# other direction, and of the first token's.
OTHERS, FIRST = 0.15, 10.0
# With a text: of all directions, of its second moments, and of first tokens beside all others.
UNSEEN, SEEN, SINK = 0.1, 0.3, 0.3
EIGENVECTORS = 16
_ITERATIONS = 6


def unknown_inputs(columns: int) -> Shaping:
    """Return what counts where nothing is known: every input as much as any."""
    return Shaping(np.zeros((0, columns)), np.full(columns, OTHERS))


def first_token_inputs(
    base: BaseModel, file: GGUFFile, names: Collection[str]
) -> dict[str, Shaping]:
    """Return what counts, by name, where all texts begin with one token.

    Every later token attends to the first, whose vectors are much longer than others, so that an
    error along them is in all of the output. They depend on no other token.

    Args:
        base: a GGUF model; without a result where its forward pass is not known here.
        file: with the tokenizer's metadata.
        names: of weights.
    """
    token = first_token(file)
    if token is None or not names or not computable(base):
        return {}
    found: dict[str, Shaping] = {}
    for seen, (vectors,) in activations(base, [[token]]):
        length = float(np.linalg.norm(vectors[0]))
        for name in set(names) & set(seen) if length else ():
            direction = vectors[:1] * (FIRST**0.5 / length)
            found[name] = Shaping(direction, np.full(direction.shape[1], OTHERS))
        if len(found) == len(names):
            break
    return found


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


def text_inputs(
    base: BaseModel, sequences: Sequence[Sequence[int]], names: Collection[str]
) -> dict[str, Shaping]:
    """Return what counts, by name, for the tokens of a text: the second moments of the inputs.

    Args:
        base: a GGUF model, `computable`.
        sequences: token ids, each beginning as texts do.
        names: of weights.
    """
    found: dict[str, Shaping] = {}
    for seen, vectors in activations(base, sequences):
        if wanted := set(names) & set(seen):
            found |= dict.fromkeys(wanted, _moments(vectors))
        if len(found) == len(names):
            break
    return found


def _moments(vectors: Sequence[Array]) -> Shaping:
    """Return the moments as their first eigenvectors and the diagonal of the rest."""
    first = np.concatenate([x[:1] for x in vectors])
    later = np.concatenate([x[1:] for x in vectors])
    # First tokens are few, long, and seen by all others.
    weight = (SINK * max(len(later), 1) / len(first)) ** 0.5
    rows = np.concatenate([later, weight * first]).astype(np.float64)
    rows *= (rows.shape[1] / np.square(rows).sum()) ** 0.5
    basis = _leading(rows)
    _, values, turned = np.linalg.svd(rows @ basis, full_matrices=False)
    most = values[:, None] * (turned @ basis.T)
    rest = np.maximum(np.square(rows).sum(0) - np.square(most).sum(0), 0)
    return Shaping(most * SEEN**0.5, UNSEEN + SEEN * rest)


def _leading(rows: Array) -> Array:
    """Return an orthonormal basis of about the first right singular vectors, (columns, k)."""
    basis = np.random.default_rng(0).standard_normal((rows.shape[1], EIGENVECTORS))
    for _ in range(_ITERATIONS):
        basis, _ = np.linalg.qr(rows.T @ (rows @ basis))
    return basis
