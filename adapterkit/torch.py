"""Adapters to and from live torch models; needs the extra `torch`.

`peft.set_peft_model_state_dict(model, to_state_dict(adapter)[0])` works on the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError
from adapterkit.formats.peft.writer import as_peft
from adapterkit.state_dict import from_state_dict as from_arrays
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.model import AdapterTensorSet


def to_state_dict(adapter: AdapterTensorSet) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return PEFT's tensors as torch CPU tensors, and the fields of their LoraConfig."""
    tensors, config = as_peft(adapter)
    return {name: to_tensor(tensor) for name, tensor in tensors.items()}, config


def from_state_dict(
    state: Mapping[str, Any], config: Mapping[str, Any] | object
) -> AdapterTensorSet:
    """Return the adapter that PEFT's torch tensors and a LoraConfig mean; the values are copied."""
    return from_arrays({name: from_tensor(x).numpy() for name, x in state.items()}, config)


def to_tensor(tensor: LazyTensor) -> Any:
    """Return a torch tensor with the same bits; quantised ones are decoded to float32."""
    torch = _torch()
    stored = tensor.cast(DType.F32) if tensor.dtype.quantised else tensor
    kind = getattr(torch, _NAMES[stored.dtype])
    if not stored.size:
        return torch.empty(stored.shape, dtype=kind)
    return torch.frombuffer(bytearray(stored.tobytes()), dtype=kind).reshape(stored.shape)


def from_tensor(tensor: Any) -> LazyTensor:
    """Return a copy of a torch tensor with the same bits."""
    torch = _torch()
    names = {getattr(torch, name): dtype for dtype, name in _NAMES.items()}
    held = tensor.detach().cpu().contiguous()
    if held.dtype not in names:
        raise UnsupportedError(f"no stored type for {held.dtype}")
    data = bytes(held.reshape(-1).view(torch.uint8).numpy()) if held.numel() else b""
    return LazyTensor(names[held.dtype], tuple(held.shape), lambda: data)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UnsupportedError("torch is not installed; pip install adapterkit[torch]") from None
    return torch


# Every type that is not quantised, by torch's name for it.
_NAMES = {
    DType.F64: "float64",
    DType.F32: "float32",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.F8_E5M2: "float8_e5m2",
    DType.F8_E8M0: "float8_e8m0fnu",
    DType.I64: "int64",
    DType.I32: "int32",
    DType.I16: "int16",
    DType.I8: "int8",
    DType.U64: "uint64",
    DType.U32: "uint32",
    DType.U16: "uint16",
    DType.U8: "uint8",
    DType.BOOL: "bool",
}
