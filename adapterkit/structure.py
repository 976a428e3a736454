"""What makes an adapter broken whatever it is for: halves, ranks, shapes, types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import FormatError
from adapterkit.model import AdapterTensorSet, Role, TensorKey

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.tensor import LazyTensor

_PARTNERS = {
    Role.LORA_A: Role.LORA_B,
    Role.LORA_B: Role.LORA_A,
    Role.EMBEDDING_A: Role.EMBEDDING_B,
    Role.EMBEDDING_B: Role.EMBEDDING_A,
}
_MATRIX = 2


def problems(adapter: AdapterTensorSet) -> list[str]:
    """Return one sentence for each defect, each naming its tensor; no tensor data is read."""
    found = [
        problem
        for key, tensor in adapter.tensors.items()
        for problem in _tensor_problems(adapter, key, tensor)
    ]
    conflicts: dict[str, list[int]] = adapter.traits.get("rank_conflicts", {})
    for module, (declared, stored) in conflicts.items():
        found.append(f"{module}: the config declares rank {declared}, the tensors have {stored}")
    return found


def check_structure(adapter: AdapterTensorSet) -> None:
    """Refuse an adapter that is broken whatever it is for.

    Raises:
        FormatError: with the first problem, and how many more there are.
    """
    if broken := problems(adapter):
        more = f" (and {len(broken) - 1} more defects)" if len(broken) > 1 else ""
        path = adapter.provenance.path if adapter.provenance else None
        raise FormatError(f"{broken[0]}{more}", path=path)


def _tensor_problems(
    adapter: AdapterTensorSet, key: TensorKey, tensor: LazyTensor
) -> Iterator[str]:
    if not tensor.size:
        yield f"{key}: is empty, shape {list(tensor.shape)} (saved from a shard; gather first)"
        return
    if not tensor.dtype.floating:
        yield f"{key}: holds {tensor.dtype} values, not real numbers"
    partner = _PARTNERS.get(key.role)
    if partner is None:
        return
    other = adapter.tensors.get(TensorKey(key.module, partner))
    if len(tensor.shape) < _MATRIX:
        yield f"{key}: has shape {list(tensor.shape)}, not that of a factor"
    elif other is None:
        yield f"{key}: has no {partner} beside it"
    elif key.role in {Role.LORA_A, Role.EMBEDDING_A}:
        yield from _rank_problems(key, tensor, other)


def _rank_problems(key: TensorKey, a: LazyTensor, b: LazyTensor) -> Iterator[str]:
    if not b.size or len(b.shape) < _MATRIX:
        return  # said of B itself
    matrices = a.shape[-2] == b.shape[-1] and a.shape[:-2] == b.shape[:-2]
    convolution = len(a.shape) == len(b.shape) > _MATRIX and a.shape[0] == b.shape[1]
    if not (matrices or convolution):
        shapes = f"A is {list(a.shape)}, B is {list(b.shape)}"
        yield f"{key.module}: ranks disagree, {shapes}"
