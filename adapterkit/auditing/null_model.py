"""The spectrum that chance gives: ΔW of Gaussian factors of the same shapes.

R of a Gaussian matrix (n, r) is drawn directly: its diagonal is χ with n, n - 1, ... degrees of
freedom and the rest is normal (Bartlett 1933). So a draw costs r x r, whatever n is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from adapterkit.lowrank.products import Array

_DRAWS = 48
# Draws for large ranks, where single ones cost much and vary little.
_WORK = 1536
_FEWEST = 4


@dataclass(frozen=True, slots=True)
class NullModel:
    """Random factors of one shape.

    Attributes:
        stable_rank: mean stable rank of the draws.
        relative: (draws, min(r, out, in)) their σ / σ₁.
    """

    stable_rank: float
    relative: Array

    def band(self) -> tuple[Array, Array]:
        """Return the 5 % and the 95 % quantile of σ / σ₁, by direction."""
        low, high = np.quantile(self.relative, (0.05, 0.95), axis=0)
        return low, high


@functools.lru_cache(maxsize=256)
def null_model(out: int, inputs: int, rank: int) -> NullModel:
    """Return what random factors B (out, r) and A (r, in) give; the draws are always the same."""
    random = np.random.default_rng((out, inputs, rank))
    draws = min(max(_WORK // rank, _FEWEST), _DRAWS)
    cores = [_triangle(random, out, rank) @ _triangle(random, inputs, rank).T for _ in range(draws)]
    values = np.linalg.svd(np.stack(cores), compute_uv=False)
    relative = values / values[:, :1]
    return NullModel(float((relative**2).sum(axis=1).mean()), relative)


def _triangle(random: np.random.Generator, count: int, rank: int) -> Array:
    """Return R (min(n, r), r) of a Gaussian (n, r)."""
    rows = min(count, rank)
    drawn = np.triu(random.standard_normal((rows, rank)), 1)
    degrees = count - np.arange(rows)
    drawn[np.arange(rows), np.arange(rows)] = np.sqrt(random.chisquare(degrees))
    return drawn
