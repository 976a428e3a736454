"""The neutral model: what an adapter is, whatever file it came from.

Nothing here is validated beyond its types. A broken adapter (A without B, ranks that disagree, NaN)
is representable, so that it can be inspected; writers refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adapterkit.keys import EMBEDDING_FACTORS, PARTNERS, Role, TensorKey
from adapterkit.model.update import Kind, Update
from adapterkit.notes import BaseReference, Provenance
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def _frozen(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(dict(value))


@dataclass(frozen=True, kw_only=True)
class AdapterTensorSet:
    """An adapter in neutral form.

    Attributes:
        tensors: every tensor by its key, in file order.
        scales: effective multiplier of each module that has factors.
        kinds: what the factors of a module are those of, EXPERTS or CONVOLUTION; where nothing is
            said, those of a linear layer or, by their roles, of an embedding.
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
    kinds: Mapping[str, Kind] = field(default_factory=dict[str, Kind])
    base: BaseReference = field(default_factory=BaseReference)
    traits: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        for name in ("tensors", "scales", "kinds", "traits", "metadata", "extras"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    @classmethod
    def of(
        cls, updates: Iterable[Update], beside: Mapping[TensorKey, LazyTensor], **fields: Any
    ) -> AdapterTensorSet:
        """Return the adapter of some updates.

        Args:
            updates: no two of one module.
            beside: tensors that are no factors, or halves alone.
            fields: the other fields.
        """
        return cls(tensors={}, scales={}, **fields).updated(updates, beside)

    def updated(
        self, updates: Iterable[Update], beside: Mapping[TensorKey, LazyTensor] | None = None
    ) -> AdapterTensorSet:
        """Return a copy with these updates, and tensors beside them, in place of what was there."""
        tensors, scales, kinds = dict(self.tensors), dict(self.scales), dict(self.kinds)
        for update in updates:
            tensors.update(zip(update.keys, (update.a, update.b), strict=True))
            scales[update.module] = update.scale
            kinds.pop(update.module, None)
            if update.kind in {Kind.EXPERTS, Kind.CONVOLUTION}:
                kinds[update.module] = update.kind
        return self.replace(tensors={**tensors, **(beside or {})}, scales=scales, kinds=kinds)

    def kind_of(self, key: TensorKey) -> Kind:
        """Return what a factor is one of."""
        if key.role in EMBEDDING_FACTORS:
            return Kind.EMBEDDING
        return self.kinds.get(key.module, Kind.LINEAR)

    def pairs(self) -> Iterator[Update]:
        """Yield every complete pair of factors, in file order; halves alone are skipped."""
        for key, tensor in self.tensors.items():
            if key.role not in {Role.LORA_A, Role.EMBEDDING_A}:
                continue
            other = TensorKey(key.module, PARTNERS[key.role])
            if other not in self.tensors:
                continue
            yield Update(
                key.module,
                tensor,
                self.tensors[other],
                self.scales.get(key.module, 1.0),
                self.kind_of(key),
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
