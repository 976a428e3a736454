"""Encoders, which answer with a vector: transformers' mean over positions, and llama.cpp's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.running import engine_answers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Vectors = np.ndarray[Any, np.dtype[np.float64]]


def embeddings(model: Any, prompts: Sequence[Sequence[int]]) -> Vectors:
    """Return the mean of each prompt's last hidden states, at unit length, (prompts, hidden)."""
    with torch.no_grad():
        states = [
            model(torch.tensor([list(prompt)])).last_hidden_state[0].double().mean(0).numpy()
            for prompt in prompts
        ]
    return _unit(np.stack(states))


def engine_embeddings(
    gguf: Path, prompts: Sequence[Sequence[int]], adapters: Sequence[tuple[Path, float]] = ()
) -> Vectors:
    """Return llama.cpp's embeddings, pooled likewise; arguments as of `engine_logprobs`."""
    return _unit(engine_answers(gguf, prompts, adapters, embedding=True))


def gaps(reference: Vectors, other: Vectors) -> Vectors:
    """Return the squared distance of each pair of vectors, which errors enter as they do a KL."""
    return ((reference - other) ** 2).sum(-1)


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
