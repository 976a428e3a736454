"""Read `.onnx_adapter` files of Olive and of onnxruntime-genai's model builder.

A file holds the inputs of one graph by their names, and nothing else: no base, no alpha, no rank.
Stored is ΔW = (A · B)ᵀ with A (in, r) and B (r, out), the scale multiplied into B. Two spellings of
a module are known: Olive's `convert-adapters` writes Hugging Face's path and `.lora_A.weight`
(olive/cli/convert_adapters.py, 2026-08-20), and a graph of the model builder has
`model.layers.N.attn.q_proj.lora_A.MatMul.weight`
(onnxruntime_genai/models/builders/base.py, 2026-08-22).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapterkit.containers.onnx_adapter import read_onnx_adapter
from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.factors import turned
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet, OnnxSource, Update
from adapterkit.notes import Provenance

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.tensor import LazyTensor

NAME = "onnx-adapter"
_INPUT = re.compile(r"^(?P<stem>.+)\.lora_(?P<half>[AB])(?P<end>(?:\.MatMul)?\.weight)$")
_BUILT = ".MatMul.weight"
# Left by Olive where the model's blocks do not lie in `model`.
_WRAPPER = "base_model.model."
_QUANTISED = re.compile(r"\.lora_[AB]\.quant\.(weight|scale|zero_point)$")
_ROLES = {"A": Role.LORA_A, "B": Role.LORA_B}


def read_onnx(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read a file; tensors stay on disk until they are asked for.

    Args:
        path: the file.
        options: none is of use: names and scales are the file's own.

    Raises:
        FormatError: if it is malformed, or holds what is no factor of LoRA.
        UnsupportedError: if its factors are quantised.
    """
    del options
    file = read_onnx_adapter(path)
    halves: dict[str, dict[str, tuple[str, LazyTensor]]] = {}
    for name, tensor in file.tensors.items():
        module, half = _place(name, path)
        found = halves.setdefault(module, {})
        if half in found:
            message = f"is the {half} of {module}, as {found[half][0]} is"
            raise FormatError(message, path=path, where=name)
        found[half] = name, _factor(name, tensor, path)
    if not halves:
        raise FormatError("holds no parameters", path=path)
    updates: list[Update] = []
    alone: dict[TensorKey, LazyTensor] = {}
    names: dict[str, tuple[str, str]] = {}
    for module, parts in halves.items():
        if len(parts) < len(_ROLES):
            alone |= {TensorKey(module, _ROLES[half]): part for half, (_, part) in parts.items()}
            continue
        (name, a), (other, b) = parts["A"], parts["B"]
        _check_fit(module, a, b, path)
        updates.append(Update(module, a, b, 1.0))
        names[module] = name, other
    source = OnnxSource(file.adapter_version, file.model_version, names)
    return AdapterTensorSet.of(
        updates, alone, source=source, provenance=Provenance(path, NAME, _notes(names))
    )


def _place(name: str, path: Path) -> tuple[str, str]:
    """Return the Hugging Face module of an input, and which factor it is."""
    if _QUANTISED.search(name):
        message = "is quantised to 4 bits in blocks; write it without --quantize_int4"
        raise UnsupportedError(message, path=path, where=name)
    match = _INPUT.match(name)
    if match is None:
        message = (
            "is no factor of LoRA as Olive or onnxruntime-genai name a graph's inputs; convert the "
            "adapter that it was made from"
        )
        raise FormatError(message, path=path, where=name)
    module = match["stem"].removeprefix(_WRAPPER)
    if match["end"] == _BUILT:
        module = re.sub(r"^(model\.layers\.\d+)\.attn\.", r"\1.self_attn.", module)
    return module, match["half"]


def _factor(name: str, tensor: LazyTensor, path: Path) -> LazyTensor:
    if not tensor.is_matrix or not tensor.dtype.floating:
        message = f"is {tensor.dtype} {list(tensor.shape)}, no matrix of real numbers"
        raise FormatError(message, path=path, where=name)
    return turned(tensor)


def _check_fit(module: str, a: LazyTensor, b: LazyTensor, path: Path) -> None:
    """Refuse factors that a graph does not multiply as x · A · B."""
    (rank, width), (height, other) = a.shape, b.shape
    stored = f"A {[width, rank]} and B {[other, height]}"
    if rank != other:
        raise FormatError(f"{stored} are no (in, r) and (r, out)", path=path, where=module)


def _notes(names: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    if not any(name.endswith(_BUILT) for name, _ in names.values()):
        return ()
    return ("its inputs are named by the model builder of onnxruntime-genai, and stay so here",)
