"""One update of one module, and what its factors mean."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.keys import EMBEDDING_FACTORS, FACTORS, TensorKey
from adapterkit.tensor import LazyTensor

_CONVOLUTION = 4


@dataclass(frozen=True, slots=True)
class LoraPair:
    """Two factors of one update, ΔW = scale · B · A.

    Attributes:
        module: the adapted module or parameter.
        a: (r, in), experts (E, r, in), embeddings (r, vocabulary).
        b: (out, r), experts (E, out, r), embeddings (width, r).
        scale: effective multiplier.
        embedding: whether the factors are those of an embedding table, ΔE = scale · (B · A)ᵀ.
    """

    module: str
    a: LazyTensor
    b: LazyTensor
    scale: float
    embedding: bool = False

    @property
    def keys(self) -> tuple[TensorKey, TensorKey]:
        """Keys of A and B in an adapter."""
        first, second = EMBEDDING_FACTORS if self.embedding else FACTORS
        return TensorKey(self.module, first), TensorKey(self.module, second)

    @property
    def rank(self) -> int:
        """Inner dimension, per expert."""
        # A of a convolution is (r, in, *kernel); B ends in its 1 x 1 kernel.
        return self.a.shape[0] if len(self.a.shape) >= _CONVOLUTION else self.b.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of B · A: (out, in) or (E, out, in)."""
        return (*self.b.shape[:-1], self.a.shape[-1])
