"""Models stored as one type."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.containers.gguf import read_gguf, write_gguf

if TYPE_CHECKING:
    from adapterkit.dtype import DType


def stored_as(source: Path, target: Path, dtype: DType) -> Path:
    file = read_gguf(source)
    tensors = {n: t.cast(dtype) if len(t.shape) > 1 else t for n, t in file.tensors.items()}
    write_gguf(target, file.typed(), tensors)
    return target


def size_of_weights(path: Path) -> int:
    """Return the bytes of all tensors of a GGUF."""
    return sum(tensor.nbytes for tensor in read_gguf(path).tensors.values())
