"""A GGUF base as its layers will be with the adapter, for what they will see of tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.dtype import DType
from adapterkit.merging.into.blocks import Merger
from adapterkit.merging.into.engine import EMBEDDING
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.base.model import BaseModel
    from adapterkit.merging.into.steps import Change


def merged_base(base: BaseModel, changes: Mapping[str, Change]) -> BaseModel:
    """Return the base with W + ΔW in float32 for each weight that changes, computed when read.

    Tables of tokens are the base's: of them single rows are read.
    """
    matrices = {
        name: LazyTensor(DType.F32, change.shape, partial(_merged, change))
        for name, change in changes.items()
        if change.steps and name != EMBEDDING and name in base.tensors
    }
    return replace(base, tensors={**base.tensors, **matrices})


def _merged(change: Change) -> bytearray:
    merger = Merger(replace(change, dtype=DType.F32, via=None))
    found = bytearray(DType.F32.nbytes(change.shape))

    def write(data: memoryview, offset: int) -> None:
        found[offset : offset + len(data)] = data

    for place in merger.places():
        merger.run([place], write)
    return found
