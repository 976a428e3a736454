"""Low-rank updates put together from shared pieces: vectors of a bank, repeated blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from adapterkit.tuners.factored import Factors, computed, equal, matrices, wide

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[np.float64]]

_STACK = 3


class Selection(NamedTuple):
    """Which vectors of a bank make up each piece of a factor.

    Attributes:
        logits: (x, y, bank size), of which the largest `top` are taken through a softmax; None if
            `indices` and `weights` say it.
        top: how many vectors are mixed.
        indices: (x, y, top), or None.
        weights: (x, y, top - 1), the last one being what is left to 1; or None.
    """

    logits: LazyTensor | None
    top: int
    indices: LazyTensor | None = None
    weights: LazyTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The first two axes."""
        tensor = self.indices if self.logits is None else self.logits
        if tensor is None or len(tensor.shape) != _STACK:
            raise ValueError("logits have three axes; these have not")
        return tensor.shape[:2]


def vector_bank(bank: LazyTensor, a: Selection, b: Selection) -> Factors:
    """Return factors whose pieces are mixtures of a few vectors of a shared bank.

    A (r, in) is r rows of in / length pieces; B (out, r) is r columns of out / length pieces.
    VB-LoRA: arXiv 2405.15179.

    Args:
        bank: (vectors, length).
        a: selection with axes (r, pieces).
        b: selection with axes (pieces, r).

    Raises:
        ValueError: if the shapes do not fit together.
    """
    matrices(vblora_vector_bank=bank)
    (rank, across), (down, other) = a.shape, b.shape
    equal("ranks", rank, other)
    length = bank.shape[1]

    def values_a() -> Array:
        return _mixed(a, wide(bank)).reshape(rank, across * length)

    def values_b() -> Array:
        return _mixed(b, wide(bank)).transpose(0, 2, 1).reshape(down * length, rank)

    return Factors(
        computed((rank, across * length), values_a), computed((down * length, rank), values_b)
    )


def _mixed(selection: Selection, bank: Array) -> Array:
    """Return (x, y, length): the weighted sum of the selected vectors."""
    import numpy as np

    if selection.logits is not None:
        logits = wide(selection.logits)
        indices = np.argpartition(logits, -selection.top, axis=-1)[..., -selection.top :]
        chosen = np.take_along_axis(logits, indices, axis=-1)
        powers = np.exp(chosen - chosen.max(-1, keepdims=True))
        weights = powers / powers.sum(-1, keepdims=True)
    else:
        assert selection.indices is not None  # noqa: S101  (where there are no logits)
        assert selection.weights is not None  # noqa: S101  (beside indices)
        indices = selection.indices.numpy().astype(np.intp)
        stored = wide(selection.weights)
        weights = np.concatenate([stored, 1 - stored.sum(-1, keepdims=True)], axis=-1)
    return np.einsum("xyk,xykl->xyl", weights, bank[indices])


def miss(block: LazyTensor, inputs: int, outputs: int) -> Factors:
    """Return the update whose column i is row i mod r of the block. MiSS: arXiv 2409.15371.

    Args:
        block: (r, out), or (r, width) with width a divisor of out: then it is repeated.
        inputs: input size of the module, which the file does not state.
        outputs: output size of the module.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    matrices(miss_block=block)
    rank, width = block.shape
    if outputs % width:
        raise ValueError(f"{outputs} outputs are no multiple of the block's {width} columns")

    def pattern() -> Array:
        import numpy as np

        return (np.arange(inputs) % rank == np.arange(rank)[:, None]).astype(np.float64)

    def repeated(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        import numpy as np

        return np.tile(values.T, (outputs // width, 1))

    a = computed((rank, inputs), pattern).cast(block.dtype)
    return Factors(a, block.map(repeated, shape=(outputs, rank)))
