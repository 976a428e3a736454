"""One update of one module, and what its factors mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from adapterkit.dtype import DType
from adapterkit.keys import EMBEDDING_FACTORS, FACTORS, Role, TensorKey
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_MATRIX, _STACK = 2, 3


class Kind(StrEnum):
    """What the factors of an update are those of; said by the reader, never guessed from axes.

    LINEAR: a matrix, ΔW = scale · B · A. EXPERTS: a stack of matrices, each with factors of its
    own, such as one for each expert. EMBEDDING: a table, ΔE = scale · (B · A)ᵀ. CONVOLUTION: the
    kernels of one that is not grouped, ΔW = scale · (B · A) with A read as (r, in · kernel).
    """

    LINEAR = "linear"
    EXPERTS = "experts"
    EMBEDDING = "embedding"
    CONVOLUTION = "convolution"


@dataclass(frozen=True, slots=True)
class Update:
    """Two factors of one update, ΔW = scale · B · A.

    Attributes:
        module: the adapted module or parameter.
        a: (r, in), experts (E, r, in), embeddings (r, vocabulary), convolutions (r, in, *kernel).
        b: (out, r), experts (E, out, r), embeddings (width, r), convolutions (out, r, 1...).
        scale: effective multiplier.
        kind: what the factors are those of.
    """

    module: str
    a: LazyTensor
    b: LazyTensor
    scale: float
    kind: Kind = Kind.LINEAR

    @property
    def embedding(self) -> bool:
        """Whether the update is that of a table, whose rows are columns of B · A."""
        return self.kind is Kind.EMBEDDING

    @property
    def keys(self) -> tuple[TensorKey, TensorKey]:
        """Keys of A and B in an adapter."""
        first, second = EMBEDDING_FACTORS if self.embedding else FACTORS
        return TensorKey(self.module, first), TensorKey(self.module, second)

    @property
    def rank(self) -> int:
        """Inner dimension, per expert; 0 where the factors of a broken update do not tell."""
        if self.kind is Kind.CONVOLUTION:
            return self.a.shape[0] if self.a.shape else 0
        if len(self.b.shape) > 1:
            return self.b.shape[-1]
        return self.a.shape[-2] if len(self.a.shape) > 1 else 0

    def delta(self) -> Array:
        """Return ΔW = scale · B · A, for small updates: float64, (out, in) or (E, out, in).

        A convolution's has the shape of its kernel, (out, in, *kernel); an embedding's is
        (vocabulary, width), as the table has it.
        """
        plain = (t.cast(DType.F32) if t.dtype.quantised else t for t in (self.a, self.b))
        a, b = (tensor.numpy().astype("float64") for tensor in plain)
        if self.kind is Kind.CONVOLUTION:
            folded = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
            return self.scale * folded.reshape(b.shape[0], *a.shape[1:])
        product = self.scale * (b @ a)
        return product.T if self.embedding else product

    @property
    def experts(self) -> int:
        """Number of matrices: that of the stacked experts, or 1."""
        return self.a.shape[0] if self.kind is Kind.EXPERTS else 1

    @property
    def sound(self) -> bool:
        """Whether the factors have the axes of their kind, none empty, and can be multiplied."""
        a, b = self.a.shape, self.b.shape
        if not (has_axes(self.kind, self.a) and has_axes(self.kind, self.b)) or 0 in {*a, *b}:
            return False
        if self.kind is Kind.CONVOLUTION:
            return len(a) == len(b) and a[0] == b[1] and math.prod(b[2:]) == 1
        return a[-2] == b[-1] and a[:-2] == b[:-2]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of B · A, per expert; a convolution's kernel counts as inputs."""
        if self.kind is Kind.CONVOLUTION:
            return self.b.shape[0], math.prod(self.a.shape[1:])
        return self.b.shape[-2], self.a.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of B · A: (out, in), experts (E, out, in), convolutions (out, in, *kernel)."""
        if self.kind is Kind.CONVOLUTION:
            return self.b.shape[0], *self.a.shape[1:]
        return (*self.b.shape[:-1], self.a.shape[-1])

    def beside(self, role: Role) -> tuple[int, ...] | None:
        """Return the shape of what acts in the module beside the factors; None for other roles.

        Magnitudes and biases are (out,) or (E, out), of an embedding (width,), those by column
        (in,); token rows are (tokens, width), of which the number of tokens is given as 0.
        """
        stack = self.b.shape[:1] if self.kind is Kind.EXPERTS else ()
        rows, columns = self.matrix_shape
        if role is Role.TOKEN_ROWS:
            return 0, rows if self.embedding else columns
        if role is Role.COLUMN_MAGNITUDE:
            return self.a.shape[1:2] if self.kind is Kind.CONVOLUTION else (*stack, columns)
        return (*stack, rows) if role in {Role.MAGNITUDE, Role.LORA_BIAS} else None

    def matrices(
        self, wide: Callable[[LazyTensor], Array] | None = None
    ) -> Iterator[tuple[Array, Array]]:
        """Yield B (out, r) and A (r, in) of each matrix: experts one by one, kernels folded.

        Args:
            wide: decodes a tensor; float64 if omitted. What it returns is not copied.
        """
        b, a = self.stacked(wide)
        return zip(b, a, strict=True)

    def stacked(self, wide: Callable[[LazyTensor], Array] | None = None) -> tuple[Array, Array]:
        """Return B (E, out, r) and A (E, r, in) of all matrices at once, as `matrices` does."""
        return self.tall(wide), self.wide(wide)

    def wide(self, decoded: Callable[[LazyTensor], Array] | None = None) -> Array:
        """Return A (E, r, in) of all matrices, decoded to float64 or as told."""
        values = (decoded or _float64)(self.a)
        return values.reshape(self.experts, self.rank, self.matrix_shape[1])

    def tall(self, decoded: Callable[[LazyTensor], Array] | None = None) -> Array:
        """Return B (E, out, r) of all matrices, decoded to float64 or as told."""
        values = (decoded or _float64)(self.b)
        return values.reshape(self.experts, self.matrix_shape[0], self.rank)

    @property
    def rank_axes(self) -> tuple[int, int]:
        """Axes of A and B along which the rank runs, counted from the front."""
        if self.kind is Kind.CONVOLUTION:
            return 0, 1
        return len(self.a.shape) - 2, len(self.b.shape) - 1

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B at another rank.

        Values as `stacked` gives them take these shapes by a mere `reshape`.
        """
        (a_axis, b_axis), a, b = self.rank_axes, self.a.shape, self.b.shape
        return (
            (*a[:a_axis], rank, *a[a_axis + 1 :]),
            (*b[:b_axis], rank, *b[b_axis + 1 :]),
        )


ONE_RANK = "is one rank's slice of a sharded model (FSDP)"
GATHER = "gather it in training, or pass what torch.distributed.checkpoint saved of all ranks"


def is_slice(factors: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Tell whether factors are one rank's rows of the whole ones, as FSDP2 keeps them.

    The rows of A are parted and so are those of B, whose columns still are the whole rank.

    Args:
        factors: shapes of A (r, in) and B (out, r) of every update.
    """
    shapes = list(factors)
    return bool(shapes) and all(
        len(a) == len(b) == _MATRIX and a[0] < b[1] <= a[1] for a, b in shapes
    )


def has_axes(kind: Kind, factor: LazyTensor) -> bool:
    """Tell whether a factor has as many axes as those of its kind."""
    axes = len(factor.shape)
    if kind is Kind.CONVOLUTION:
        return axes > _MATRIX
    return axes == (_STACK if kind is Kind.EXPERTS else _MATRIX)


def _float64(tensor: LazyTensor) -> Array:
    import numpy as np

    return np.asarray(tensor.numpy(), dtype=np.float64)
