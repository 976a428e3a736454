"""onnxruntime itself, on a graph whose inputs are the factors of LoRA as Olive names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

Array = np.ndarray[Any, np.dtype[Any]]
ENDS = ".lora_A.weight", ".lora_B.weight"
# Errors only: it warns of defaults that inputs may replace, which is what they are for.
_QUIET = 3


def parameters(path: Path) -> dict[str, Array]:
    """Return what onnxruntime reads from a file."""
    stored = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    return {name: np.array(value.numpy()) for name, value in stored.items()}


def export(path: Path, values: Mapping[str, Array], adapter: int = 0, model: int = 0) -> Path:
    """Write a file with onnxruntime."""
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(adapter)
    form.set_model_version(model)
    wrap = onnxruntime.OrtValue.ortvalue_from_numpy
    form.set_parameters({name: wrap(np.ascontiguousarray(v)) for name, v in values.items()})
    form.export_adapter(str(path))
    return path


def updates(
    path: Path, shapes: Mapping[str, tuple[int, int]], dtype: int = TensorProto.FLOAT
) -> dict[str, Array]:
    """Return what a graph with the adapter multiplies into each module, as (in, out).

    Like a graph of Olive's ExtractAdapters, it has for each module two inputs of any rank, empty by
    default; onnxruntime refuses a parameter of another name or type.

    Args:
        path: the adapter.
        shapes: (in, out) by module.
        dtype: of the inputs.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    model = _graph(shapes, dtype).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    run = onnxruntime.RunOptions()
    run.log_severity_level = _QUIET
    run.add_active_adapter(adapter)
    return dict(zip(shapes, session.run(list(shapes), {}, run), strict=True))


def _graph(shapes: Mapping[str, tuple[int, int]], dtype: int) -> onnx.ModelProto:
    inputs, defaults, nodes, outputs = [], [], [], []
    for module, (width, height) in shapes.items():
        rank = f"{module}.r"
        for name, shape, empty in _factors(module, width, height, rank):
            inputs.append(helper.make_tensor_value_info(name, dtype, shape))
            defaults.append(helper.make_tensor(name, dtype, empty, []))
        nodes.append(helper.make_node("MatMul", [module + end for end in ENDS], [module]))
        outputs.append(helper.make_tensor_value_info(module, dtype, [width, height]))
    graph = helper.make_graph(nodes, "updates", inputs, outputs, defaults)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def _factors(
    module: str, width: int, height: int, rank: str
) -> Iterator[tuple[str, list[int | str], list[int]]]:
    yield module + ENDS[0], [width, rank], [width, 0]
    yield module + ENDS[1], [rank, height], [0, height]
