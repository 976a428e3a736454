"""Next-token distributions: prompts to ask for, transformers' answers, and their distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.bases import BaseFixture

Distributions = np.ndarray[Any, np.dtype[np.float64]]

LONGEST = 17


def prompts_for(base: BaseFixture, seed: int = 2) -> list[list[int]]:
    """Return every prefix of one prompt of 17 tokens, then unrelated ones of 1, 2 and 5."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, base.vocabulary, count).tolist() for count in (LONGEST, 1, 2, 5)]
    return [*(ids[0][:count] for count in range(1, LONGEST + 1)), *ids[1:]]


def logprobs(model: Any, prompts: Sequence[Sequence[int]]) -> Distributions:
    """Return log-probabilities of the token after each prompt, (prompts, vocabulary)."""
    with torch.no_grad():
        logits = [model(torch.tensor([list(prompt)])).logits[0, -1] for prompt in prompts]
    return normalised(torch.stack(logits).to(torch.float64).numpy())


def normalised(logits: Distributions) -> Distributions:
    """Return log-softmax over the last axis."""
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def kl(reference: Distributions, other: Distributions) -> Distributions:
    """Return the Kullback-Leibler divergence of each row, in nats."""
    p, q = normalised(reference), normalised(other)
    return (np.exp(p) * (p - q)).sum(-1)


def by_length(prompts: Sequence[Sequence[int]], distances: Distributions) -> str:
    """Spell the largest distance of each length of prompt: where it begins is what went wrong."""
    worst: dict[int, float] = {}
    for prompt, distance in zip(prompts, distances, strict=True):
        worst[len(prompt)] = max(worst.get(len(prompt), 0.0), float(distance))
    return ", ".join(f"{count}: {worst[count]:.0e}" for count in sorted(worst))


def max_kl(reference: Distributions, other: Distributions) -> float:
    """Return the largest divergence over all prompts."""
    return float(kl(reference, other).max())
