"""Adapters of onnxruntime: what it runs is what the adapter says, and what it writes is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_oracle
import pytest
from onnx import TensorProto
from safetensors.numpy import save_file

from adapterkit import OnnxSource, convert, diff, inspect, read
from adapterkit.errors import FormatError, LossyConversionError, UnsupportedError
from adapterkit.keys import Role, TensorKey

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY = FIXTURES / "peft" / "tiny"
OLIVE = FIXTURES / "onnx" / "olive.onnx_adapter"
BUILDER = FIXTURES / "onnx" / "builder.onnx_adapter"
QUERY = "model.layers.0.self_attn.q_proj"


def deltas(path: Path) -> dict[str, Array]:
    return {pair.module: pair.delta() for pair in read(path).pairs()}


def shapes(of: dict[str, Array]) -> dict[str, tuple[int, int]]:
    return {module: (delta.shape[1], delta.shape[0]) for module, delta in of.items()}


def pair(module: str, end: str = ".weight", rank: int = 3) -> dict[str, Array]:
    draw = np.random.default_rng(0).standard_normal
    return {
        f"{module}.lora_A{end}": draw((8, rank)).astype("f4"),
        f"{module}.lora_B{end}": draw((rank, 6)).astype("f4"),
    }


@pytest.mark.parametrize("outtype", ["auto", "f32", "f16"])
def test_onnxruntime_multiplies_what_the_adapter_says(outtype: str, tmp_path: Path) -> None:
    out = tmp_path / "a.onnx_adapter"
    report = convert(TINY, out, outtype=outtype)
    assert report.modules
    want = deltas(TINY)
    half = outtype == "f16"
    number = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    got = onnx_oracle.updates(out, shapes(want), number)
    for module, delta in want.items():
        error = np.abs(got[module].T.astype("f8") - delta).max() / np.abs(delta).max()
        assert error < (2e-3 if half else 1e-6), module


def test_scales_and_ranks_of_each_module_are_its_own(tmp_path: Path) -> None:
    source = FIXTURES / "peft" / "patterns"
    convert(source, tmp_path / "a.onnx_adapter")
    want = deltas(source)
    got = onnx_oracle.updates(tmp_path / "a.onnx_adapter", shapes(want))
    for module, delta in want.items():
        np.testing.assert_allclose(got[module].T, delta, rtol=1e-5, atol=1e-6)
    assert diff(source, tmp_path / "a.onnx_adapter").equal


def test_what_onnxruntime_writes_is_read(tmp_path: Path) -> None:
    values = pair(QUERY)
    path = onnx_oracle.export(tmp_path / "any name", values, 3, 7)
    adapter = read(path)
    (found,) = adapter.pairs()
    names = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
    assert adapter.source == OnnxSource(3, 7, {QUERY: names})
    np.testing.assert_allclose(found.delta(), (values[names[0]] @ values[names[1]]).T, rtol=1e-5)
    assert inspect(path).format == "onnx-adapter"


def test_a_file_that_is_written_again_is_the_same_to_onnxruntime(tmp_path: Path) -> None:
    values = pair("model.layers.0.attn.q_proj", ".MatMul.weight")
    values = {name: value.astype("f2") for name, value in values.items()}
    path = onnx_oracle.export(tmp_path / "first.onnx_adapter", values, 3, 7)
    convert(path, tmp_path / "again.onnx_adapter")
    again = onnx_oracle.parameters(tmp_path / "again.onnx_adapter")
    assert again.keys() == values.keys()
    for name, value in values.items():
        assert again[name].dtype == value.dtype
        assert np.array_equal(again[name], value)
    assert read(path).source == read(tmp_path / "again.onnx_adapter").source


def test_names_of_the_model_builder_are_those_of_hugging_face() -> None:
    assert deltas(BUILDER).keys() == deltas(OLIVE).keys()
    for module, delta in deltas(OLIVE).items():
        assert np.array_equal(deltas(BUILDER)[module], delta)


def test_what_olive_leaves_before_a_name_is_no_part_of_it(tmp_path: Path) -> None:
    values = pair("base_model.model.transformer.h.0.mlp.c_fc")
    path = onnx_oracle.export(tmp_path / "a", values)
    assert read(path).modules == ("transformer.h.0.mlp.c_fc",)


def test_half_a_pair_is_a_finding(tmp_path: Path) -> None:
    values = {name: v for name, v in pair(QUERY).items() if "lora_A" in name}
    path = onnx_oracle.export(tmp_path / "a", values)
    assert list(read(path).tensors) == [TensorKey(QUERY, Role.LORA_A)]


REFUSED: dict[str, tuple[dict[str, Array], type[Exception], str]] = {
    "quantised": (
        {f"{QUERY}.lora_A.quant.weight": np.zeros((3, 1, 16), "u1")},
        UnsupportedError,
        "4 bits",
    ),
    "an input": ({"past_key_values": np.zeros((2, 2), "f4")}, FormatError, "no factor of LoRA"),
    "no matrix": ({f"{QUERY}.lora_A.weight": np.zeros(3, "f4")}, FormatError, "no matrix"),
    "numbers": ({f"{QUERY}.lora_A.weight": np.zeros((3, 2), "i4")}, FormatError, "no matrix"),
    "twice": (
        pair(QUERY) | pair(f"base_model.model.{QUERY}"),
        FormatError,
        f"is the A of {QUERY}",
    ),
    "as PEFT has them": (
        {name: value.T for name, value in pair(QUERY).items()},
        FormatError,
        r"A \[3, 8\] and B \[6, 3\] are no",
    ),
    "nothing": ({}, FormatError, "holds no parameters"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_adapter_is_refused_by_name(what: str, tmp_path: Path) -> None:
    values, kind, message = REFUSED[what]
    path = onnx_oracle.export(tmp_path / "a", values)
    with pytest.raises(kind, match=message):
        read(path)


def test_dora_and_saved_modules_are_losses(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "dora")
    config = json.loads((TINY / "adapter_config.json").read_text())
    config |= {"use_dora": True, "modules_to_save": ["norm"]}
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(config))
    adapter = read(TINY)
    stem = "base_model.model."
    stored: dict[str, Array] = {f"{stem}model.norm.weight": np.ones(8, "f4")}
    for update in adapter.pairs():
        stored[f"{stem}{update.module}.lora_A.weight"] = update.a.numpy()
        stored[f"{stem}{update.module}.lora_B.weight"] = update.b.numpy()
        rows = update.b.shape[0]
        stored[f"{stem}{update.module}.lora_magnitude_vector"] = np.ones(rows, "f4")
    save_file(stored, tmp_path / "dora" / "adapter_model.safetensors")
    with pytest.raises(LossyConversionError) as caught:
        convert(tmp_path / "dora", tmp_path / "a.onnx_adapter")
    assert {loss.code for loss in caught.value.losses} >= {"dora", "saved-module"}
    assert not (tmp_path / "a.onnx_adapter").exists()
    report = convert(tmp_path / "dora", tmp_path / "a.onnx_adapter", allow_lossy=True)
    assert {loss.code for loss in report.losses} >= {"dora", "saved-module"}
