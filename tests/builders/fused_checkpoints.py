"""Bases whose parameters are stored together, as files have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.containers.gguf import (
    read_gguf,
    write_gguf,
)
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from engine import (
        BaseFixture,
    )

    Array = np.ndarray[Any, np.dtype[Any]]
    Tensors = dict[str, Array]


def rewritten(
    base: BaseFixture,
    path: Path,
    change: Callable[[Tensors], Tensors],
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the base's GGUF again with other tensors."""
    file = read_gguf(base.gguf)
    tensors = change({name: tensor.numpy() for name, tensor in file.tensors.items()})
    lazy = {name: LazyTensor.of(np.ascontiguousarray(x)) for name, x in tensors.items()}
    write_gguf(path, {**file.typed(), **(metadata or {})}, lazy)
    return path


def fused(name: str, parts: tuple[str, ...], axis: int) -> Callable[[Tensors], Tensors]:
    """Stack the rows of parts into one tensor, in every layer that has them."""

    def change(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        for layer in range(8):
            for suffix in ("weight", "bias"):
                names = [f"blk.{layer}.{part}.{suffix}" for part in parts]
                if all(part in made for part in names):
                    stacked = [made.pop(part) for part in names]
                    joint = np.concatenate(stacked, axis if suffix == "weight" else -1)
                    made[f"blk.{layer}.{name}.{suffix}"] = joint
        return made

    return change


QKV = fused("attn_qkv", ("attn_q", "attn_k", "attn_v"), 0)
