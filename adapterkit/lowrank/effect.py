"""Whether an adapter does anything: one answer, which every command asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.keys import Role, TensorKey
from adapterkit.lowrank.differences import silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.tensor import LazyTensor

IDLE = "every update is zero: the adapter changes nothing; was it trained?"
# Elements that are looked at at a time.
_BLOCK = 1 << 20


def idle(adapter: AdapterTensorSet, zero: Callable[[Update], bool] = silent) -> bool:
    """Tell whether an adapter changes nothing; one module that does is enough.

    DoRA magnitudes, rows of tokens and whole weights replace what the base has, so that without it
    they are taken to change something.

    Args:
        adapter: with factors; one without is not idle, but broken or whole weights.
        zero: tells whether an update is zero.
    """
    pairs = list(adapter.pairs())
    factors = {key for pair in pairs for key in pair.keys}
    others = adapter.tensors.keys() - factors
    return bool(pairs) and not any(acts(adapter, key) for key in others) and all(map(zero, pairs))


def acts(adapter: AdapterTensorSet, key: TensorKey) -> bool:
    """Tell whether a tensor that is no factor of a pair can change something."""
    if key.role is Role.LORA_BIAS:
        return _any(adapter.tensors[key])
    return key.role is not Role.BASE_COPY


def _any(tensor: LazyTensor) -> bool:
    return any(bool(block.numpy().any()) for block in tensor.blocks(_BLOCK))
