"""Write `.onnx_adapter` files: transposed factors of one type, their scale multiplied into B."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.containers.onnx_adapter import write_onnx_adapter
from adapterkit.dtype import DType
from adapterkit.factors import turned, with_scale
from adapterkit.model import OnnxSource, spelled_out

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.tensor import LazyTensor

STORABLE = (DType.F32, DType.F16, DType.BF16)


def write_onnx(adapter: AdapterTensorSet, path: Path, options: FormatOptions) -> None:
    """Write one file, as Olive's `convert-adapters` names a graph's inputs, or as the source does.

    Args:
        adapter: what to write; parts that the format cannot hold have been reported already.
        path: file to create.
        options: `dtype` for all factors, which must be the graph's: onnxruntime takes no other.
            None keeps that of an .onnx_adapter, and is float32 for all else, as Olive's is.
    """
    adapter = spelled_out(adapter)
    updates = [with_scale(update, 1.0) for update in adapter.pairs()]
    source, dtype = OnnxSource(0, 0, {}), DType.F32
    if isinstance(adapter.source, OnnxSource):
        source, dtype = adapter.source, _common(updates)
    tensors: dict[str, LazyTensor] = {}
    for update in updates:
        module = update.module
        usual = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        for name, factor in zip(source.names.get(module, usual), (update.a, update.b), strict=True):
            tensors[name] = turned(factor).cast(options.dtype or dtype)
    write_onnx_adapter(
        path,
        tensors,
        adapter_version=source.adapter_version,
        model_version=source.model_version,
    )


def _common(updates: Sequence[Update]) -> DType:
    found = {factor.dtype for update in updates for factor in (update.a, update.b)}
    (first,) = found if len(found) == 1 else {DType.F32}
    return first if first in STORABLE else DType.F32
