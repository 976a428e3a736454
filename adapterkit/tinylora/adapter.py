"""A TinyLoRA adapter as its formats share it, and the plain LoRA that it is equal to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.keys import PARTNERS, TensorKey
from adapterkit.model import AdapterTensorSet, Kind, Source, Update
from adapterkit.tensor import LazyTensor
from adapterkit.tinylora.settings import TinySettings
from adapterkit.tinylora.witness import Witness

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.notes import BaseReference, Provenance

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModule:
    """One module's frozen parts, ΔW = scale · left · (Σᵢ vᵢ Pᵢ) · right.

    Attributes:
        name: Hugging Face path.
        left: (out, r); of an embedding (vocabulary, r).
        right: (r, in); of an embedding (r, width).
        projection: P, (u, r, r).
        group: which vector of coefficients it uses.
        scale: constant factor.
        embedding: whether the module is an embedding table.
        witness: what the base's weight was, if that is known.
    """

    name: str
    left: LazyTensor
    right: LazyTensor
    projection: LazyTensor
    group: int
    scale: float = 1.0
    embedding: bool = False
    witness: Witness | None = None

    @property
    def rank(self) -> int:
        """Rank of the plain LoRA: r, or less for a smaller matrix."""
        return min(self.left.shape[0], self.left.shape[1], self.right.shape[1])

    @property
    def dtype(self) -> DType:
        """Type in which the equal LoRA is stored: that of the frozen factors."""
        return self.left.dtype if self.left.dtype is self.right.dtype else DType.F32


@dataclass(frozen=True, kw_only=True)
class TinyAdapter:
    """A whole adapter in TinyLoRA's own terms.

    Attributes:
        modules: the adapted modules.
        vectors: coefficients (u,) of each group.
        form: `pack`, `peft` or `carried`, the implementation whose conventions it follows.
        settings: how the frozen parts were made, for the forms that rebuild them.
        config: the adapter_config.json that it came with.
    """

    modules: tuple[TinyModule, ...]
    vectors: Mapping[int, LazyTensor]
    form: str
    settings: TinySettings | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def coefficients(self) -> int:
        """Number of trained numbers."""
        return sum(vector.size for vector in self.vectors.values())


def wide(tensor: LazyTensor) -> Array:
    """Return a tensor in float64."""
    import numpy as np

    return np.asarray(tensor.numpy(), dtype=np.float64)


def middle(module: TinyModule, vector: LazyTensor) -> Array:
    """Return scale · Σᵢ vᵢ Pᵢ, float64 (r, r)."""
    import numpy as np

    return module.scale * np.tensordot(wide(vector), wide(module.projection), 1)


def balanced(left: Array, right: Array, core: Array) -> tuple[Array, Array]:
    """Split left · core · right into A (k, in) and B (out, k) of equal norms, k the rank.

    Each half carries the square root of every singular value: the plain split (left · core, right)
    would put tiny coefficients into one factor alone, where float16 has no digits for them.
    """
    import numpy as np

    from adapterkit.lowrank.decomposition import decompose
    from adapterkit.lowrank.products import LowRank

    inner = left @ core
    if not (np.isfinite(inner).all() and np.isfinite(right).all()):
        return right, inner  # broken, and to be seen as such
    b, a = decompose(LowRank(inner, right), 0.0).factors(min(inner.shape[0], *right.shape))
    return a, b


@dataclass(frozen=True, slots=True)
class TinySource(Source):
    """The TinyLoRA that a plain LoRA was made from.

    Attributes:
        adapter: the TinyLoRA.
        factors: what it was written out as.
    """

    adapter: TinyAdapter
    factors: Mapping[TensorKey, LazyTensor]


def neutral(
    tiny: TinyAdapter,
    *,
    base: BaseReference,
    provenance: Provenance,
    others: Mapping[TensorKey, LazyTensor] | None = None,
) -> AdapterTensorSet:
    """Return the plain LoRA that a TinyLoRA adapter is equal to; it remembers what it came from.

    Args:
        tiny: the adapter.
        base: what it says of its base.
        provenance: where it was read.
        others: tensors beside the update, such as saved modules.
    """
    updates: list[Update] = []
    for module in tiny.modules:
        kind = Kind.EMBEDDING if module.embedding else Kind.LINEAR
        factors = _factors(module, tiny.vectors[module.group])
        updates.append(Update(module.name, *factors, 1.0, kind))
    known = {key: t for u in updates for key, t in zip(u.keys, (u.a, u.b), strict=True)}
    return AdapterTensorSet.of(
        updates,
        others or {},
        base=base,
        source=TinySource(tiny, known),
        provenance=provenance,
    )


def _factors(module: TinyModule, vector: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """Return lazy A and B; of an embedding both turned, for ΔE = (B · A)ᵀ."""
    rank, dtype = module.rank, module.dtype
    rows, columns = module.left.shape[0], module.right.shape[1]

    def split(place: int) -> Array:
        return balanced(wide(module.left), wide(module.right), middle(module, vector))[place]

    if module.embedding:
        return (
            LazyTensor.computed(dtype, (rank, rows), lambda: split(1).T),
            LazyTensor.computed(dtype, (columns, rank), lambda: split(0).T),
        )
    return (
        LazyTensor.computed(dtype, (rank, columns), lambda: split(0)),
        LazyTensor.computed(dtype, (rows, rank), lambda: split(1)),
    )


def carried(adapter: AdapterTensorSet) -> TinyAdapter | None:
    """Return the TinyLoRA that an adapter was read from, if its factors are still those.

    Whatever changed a factor, a module or a scale since made it a plain LoRA.
    """
    source = adapter.source
    if not isinstance(source, TinySource):
        return None
    known = source.factors
    mine = {key: tensor for key, tensor in adapter.tensors.items() if key.role in PARTNERS}
    same = mine.keys() == known.keys() and all(mine[key] is known[key] for key in known)
    unit = all(adapter.scales.get(key.module) == 1.0 for key in known)
    return source.adapter if same and unit else None
