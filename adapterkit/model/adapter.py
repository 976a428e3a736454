"""The neutral model: what an adapter is, whatever file it came from.

Nothing here is validated beyond its types. A broken adapter (A without B, ranks that disagree, NaN)
is representable, so that it can be inspected; writers refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adapterkit.keys import PARTNERS, Role, TensorKey
from adapterkit.model.update import LoraPair
from adapterkit.notes import BaseReference, Provenance
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator


def _frozen(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(dict(value))


@dataclass(frozen=True, kw_only=True)
class AdapterTensorSet:
    """An adapter in neutral form.

    Attributes:
        tensors: every tensor by its key, in file order.
        scales: effective multiplier of each module that has factors.
        base: the model it was trained on, as recorded.
        traits: settings that change what the tensors mean and are no tensors, by PEFT's names
            (`init_lora_weights`, `layer_replication`, `alora_invocation_tokens`), plus
            `engine_layout`: module -> llama.cpp tensor, for modules still in llama.cpp's own layout
            because no base was given, and `rank_conflicts`: module -> [declared, stored] ranks.
            A writer holds each of them or reports it as a loss.
        metadata: free text that travels to any format.
        extras: format name -> leftovers that only this format's writer reads back.
        provenance: where it was read from.
    """

    tensors: Mapping[TensorKey, LazyTensor]
    scales: Mapping[str, float]
    base: BaseReference = field(default_factory=BaseReference)
    traits: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        for name in ("tensors", "scales", "traits", "metadata", "extras"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    def pairs(self) -> Iterator[LoraPair]:
        """Yield every complete pair of factors, in file order; halves alone are skipped."""
        for key, tensor in self.tensors.items():
            if key.role not in {Role.LORA_A, Role.EMBEDDING_A}:
                continue
            other = TensorKey(key.module, PARTNERS[key.role])
            if other not in self.tensors:
                continue
            yield LoraPair(
                key.module,
                tensor,
                self.tensors[other],
                self.scales.get(key.module, 1.0),
                embedding=key.role is Role.EMBEDDING_A,
            )

    @property
    def modules(self) -> tuple[str, ...]:
        """Adapted modules and replaced parameters, in file order."""
        return tuple(dict.fromkeys(key.module for key in self.tensors))

    @property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(tensor.size for tensor in self.tensors.values())

    def replace(self, **changes: Any) -> AdapterTensorSet:
        """Return a copy with the named fields changed."""
        return replace(self, **changes)
