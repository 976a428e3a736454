"""Findings about a GGUF adapter as a file: what llama.cpp's loader and its kernels demand of it.

The rules are those of src/llama-adapter.cpp and of ggml's matrix products, each tried in llama.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.checks.findings import Finding, Severity, named
from adapterkit.containers.gguf import ValueType, read_gguf
from adapterkit.dtype import DType

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ALPHA = "adapter.lora.alpha"
_NORM = "_norm.weight"
_COMPUTABLE = {DType.F32, DType.F16, DType.BF16}


def check_gguf_file(path: Path) -> Iterator[Finding]:
    """Yield what llama.cpp refuses or dies of in an adapter; no tensor data is read."""
    file = read_gguf(path)
    if file.metadata.get("general.type") != "adapter":
        return
    kind = file.kinds.get(_ALPHA, ValueType.FLOAT32)
    if kind is not ValueType.FLOAT32:
        message = f"is stored as {kind.name}: llama.cpp aborts unless it is FLOAT32"
        yield Finding("LCP007", Severity.ERROR, named(_ALPHA), message, _AGAIN, fix="to-gguf")
    for name, tensor in file.tensors.items():
        if name.endswith(_NORM):
            continue
        if not name.endswith((".lora_a", ".lora_b")):
            message = (
                "ends in neither .lora_a, .lora_b nor _norm.weight: llama.cpp refuses the file"
            )
            yield Finding("LCP004", Severity.ERROR, named(name), message, "leave the tensor out")
        elif tensor.dtype.floating and not _computable(tensor.dtype):
            message = f"is stored as {tensor.dtype}, and llama.cpp dies as it multiplies"
            yield Finding("LCP016", Severity.ERROR, named(name), message, _AGAIN, fix="to-gguf")


def _computable(dtype: DType) -> bool:
    return dtype in _COMPUTABLE or dtype.quantised


_AGAIN = "adapterkit convert SRC -o DST.gguf writes it anew"
