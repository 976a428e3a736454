"""What makes an adapter broken whatever it is for: halves, ranks, shapes, types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.errors import FormatError
from adapterkit.keys import PARTNERS, Role, TensorKey

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.model.adapter import AdapterTensorSet
    from adapterkit.tensor import LazyTensor

_MATRIX = 2


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that makes an adapter broken.

    Attributes:
        kind: `half`, `ranks`, `empty`, `integers`, `axes` or `declared-rank`.
        where: tensor or module.
        message: what is the case.
        embedding: whether it is about the factors of an embedding.
    """

    kind: str
    where: str
    message: str
    embedding: bool = False


def defects(adapter: AdapterTensorSet) -> Iterator[Defect]:
    """Yield every defect, by tensor and then those of the config; no tensor data is read."""
    for key, tensor in adapter.tensors.items():
        yield from _of_tensor(adapter, key, tensor)
    conflicts: dict[str, list[int]] = adapter.traits.get("rank_conflicts", {})
    for module, (declared, stored) in conflicts.items():
        message = f"the config declares rank {declared}, the tensors have {stored}"
        yield Defect("declared-rank", module, message)


def problems(adapter: AdapterTensorSet) -> list[str]:
    """Return one sentence for each defect, each naming its tensor; no tensor data is read."""
    asides = {"empty": " (saved from a shard; gather first)"}
    return [f"{d.where}: {d.message}{asides.get(d.kind, '')}" for d in defects(adapter)]


def check_structure(adapter: AdapterTensorSet) -> None:
    """Refuse an adapter that is broken whatever it is for.

    Raises:
        FormatError: with the first problem, and how many more there are.
    """
    if broken := problems(adapter):
        more = f" (and {len(broken) - 1} more defects)" if len(broken) > 1 else ""
        path = adapter.provenance.path if adapter.provenance else None
        raise FormatError(f"{broken[0]}{more}", path=path)


def _of_tensor(adapter: AdapterTensorSet, key: TensorKey, tensor: LazyTensor) -> Iterator[Defect]:
    name, shape = str(key), list(tensor.shape)
    if not tensor.size:
        yield Defect("empty", name, f"is empty, shape {shape}")
        return
    if not tensor.dtype.floating:
        yield Defect("integers", name, f"holds {tensor.dtype} values, not real numbers")
    partner = PARTNERS.get(key.role)
    if partner is None:
        return
    other = adapter.tensors.get(TensorKey(key.module, partner))
    if len(shape) < _MATRIX:
        yield Defect("axes", name, f"has shape {shape}, not that of a factor")
    elif other is None:
        yield Defect("half", name, f"has no {partner} beside it")
    elif key.role in {Role.LORA_A, Role.EMBEDDING_A}:
        yield from _of_ranks(key, tensor, other)


def _of_ranks(key: TensorKey, a: LazyTensor, b: LazyTensor) -> Iterator[Defect]:
    if not b.size or len(b.shape) < _MATRIX:
        return  # said of B itself
    matrices = a.shape[-2] == b.shape[-1] and a.shape[:-2] == b.shape[:-2]
    convolution = len(a.shape) == len(b.shape) > _MATRIX and a.shape[0] == b.shape[1]
    if not (matrices or convolution):
        shapes = f"A is {list(a.shape)}, B is {list(b.shape)}"
        embedding = key.role is Role.EMBEDDING_A
        yield Defect("ranks", key.module, f"ranks disagree, {shapes}", embedding)
