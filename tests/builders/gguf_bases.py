"""GGUF bases in other types, and what they decode to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.containers.gguf import Typed, read_gguf, write_gguf
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.dtype import DType


def retyped(
    source: Path,
    target: Path,
    dtype: DType,
    *,
    alignment: int | None = None,
    more: Mapping[str, Typed] | None = None,
) -> Path:
    """Write a GGUF again with all matrices of one type."""
    file = read_gguf(source)
    stored = {
        name: LazyTensor.of(tensor.numpy(), dtype) if len(tensor.shape) > 1 else tensor
        for name, tensor in file.tensors.items()
    }
    write_gguf(target, file.typed() | dict(more or {}), stored, alignment=alignment)
    return target
