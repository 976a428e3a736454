"""The neutral model: what an adapter is, whatever file it came from.

Nothing here is validated beyond its types. A broken adapter (A without B, ranks that disagree, NaN)
is representable, so that it can be inspected; writers refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator


class Role(StrEnum):
    """What a tensor does for its module.

    Shapes: LORA_A (r, in), LORA_B (out, r), of experts (E, r, in) and (E, out, r), of convolutions
    (r, in, *kernel) and (out, r, 1...); EMBEDDING_A (r, vocabulary), EMBEDDING_B (width, r);
    MAGNITUDE (out,) of DoRA; LORA_BIAS (out,) added after B, scaled like it; FULL, an absolute
    replacement of a parameter; TOKEN_ROWS (tokens, width), absolute rows of an embedding;
    BASE_COPY, the frozen weight under an adapted embedding, which PEFT saves and never trains.
    """

    LORA_A = "lora_A"
    LORA_B = "lora_B"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "magnitude"
    LORA_BIAS = "lora_bias"
    FULL = "full"
    BASE_COPY = "base_copy"
    TOKEN_ROWS = "token_rows"  # noqa: S105  (not a password)


@dataclass(frozen=True, slots=True, order=True)
class TensorKey:
    """Where a tensor belongs.

    Attributes:
        module: Hugging Face path in the base model, without training wrappers:
            `model.layers.0.self_attn.q_proj`. For a bare parameter (fused experts, and every FULL
            tensor) the parameter's path: `model.layers.0.mlp.experts.down_proj`, `lm_head.weight`.
        role: what the tensor does for the module.
    """

    module: str
    role: Role

    def __str__(self) -> str:
        """Return the key as messages name it."""
        return f"{self.module}.{self.role}"


_CONVOLUTION = 4
_FACTOR_ROLES = (Role.LORA_A, Role.LORA_B)
_EMBEDDING_ROLES = (Role.EMBEDDING_A, Role.EMBEDDING_B)


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
        roles = _EMBEDDING_ROLES if self.embedding else _FACTOR_ROLES
        return TensorKey(self.module, roles[0]), TensorKey(self.module, roles[1])

    @property
    def rank(self) -> int:
        """Inner dimension, per expert."""
        # A of a convolution is (r, in, *kernel); B ends in its 1 x 1 kernel.
        return self.a.shape[0] if len(self.a.shape) >= _CONVOLUTION else self.b.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of B · A: (out, in) or (E, out, in)."""
        return (*self.b.shape[:-1], self.a.shape[-1])


@dataclass(frozen=True, slots=True)
class Loss:
    """Something a target cannot hold.

    Attributes:
        code: stable short name, such as `dora` or `tied-embedding`.
        subject: the module, tensor or setting concerned.
        message: why, and what to do instead.
        drops: the tensors that `allow_lossy` leaves out; empty where dropping is no way out.
        blocks: false for a warning, which is reported and stops nothing.
    """

    code: str
    subject: str
    message: str
    drops: tuple[TensorKey, ...] = ()
    blocks: bool = True

    @property
    def droppable(self) -> bool:
        """Whether `allow_lossy` may write the rest without it."""
        return bool(self.drops)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an adapter was read from.

    Attributes:
        path: file or directory.
        format: name of the format, as `adapterkit formats` lists it.
        notes: what the reader normalised on the way, one sentence each.
    """

    path: Path
    format: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BaseReference:
    """What an adapter says of the model it was trained on; every field may be unknown.

    Attributes:
        name: hub id or path.
        revision: hub revision.
        architecture: GGUF architecture name or Hugging Face class, as recorded.
    """

    name: str | None = None
    revision: str | None = None
    architecture: str | None = None


_MAPPINGS = ("tensors", "scales", "traits", "metadata", "extras")


def _frozen(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(dict(value))


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterTensorSet:
    """An adapter in neutral form; it pickles and copies, whatever its tensors are read from.

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
    base: BaseReference = BaseReference()
    traits: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        for name in _MAPPINGS:
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields with plain dictionaries, which can be pickled and copied."""
        return {**vars(self), **{name: dict(getattr(self, name)) for name in _MAPPINGS}}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take the fields and close their dictionaries again."""
        self.__dict__.update(state)
        self.__post_init__()

    def __repr__(self) -> str:
        """Return counts and names; what is in the tensors is for `summarize` to tell."""
        facts = [f"{len(self.modules)} modules", f"{len(self.tensors)} tensors"]
        if self.provenance:
            facts.append(self.provenance.format)
        if self.base.name:
            facts.append(f"base {self.base.name!r}")
        return f"<AdapterTensorSet: {', '.join(facts)}>"

    def pairs(self) -> Iterator[LoraPair]:
        """Yield every complete pair of factors, in file order; halves alone are skipped."""
        for key, tensor in self.tensors.items():
            other = _PARTNER.get(key.role)
            if other is None or TensorKey(key.module, other) not in self.tensors:
                continue
            yield LoraPair(
                key.module,
                tensor,
                self.tensors[TensorKey(key.module, other)],
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


_PARTNER = {Role.LORA_A: Role.LORA_B, Role.EMBEDDING_A: Role.EMBEDDING_B}
