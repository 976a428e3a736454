"""DoRA by column, as LyCORIS (`wd_on_out=False`) and OneTrainer train it: W' = m V / ‖V‖.

V = W + ΔW, and the norm is over all axes but that of the inputs; in float64 algebra here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusion_bases import pipeline
from diffusion_files import contents, drawn, kohya, read, saved, update
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit import Outcome
from adapterkit.errors import (
    IncompatibleBaseError,
    LossyConversionError,
    UnsupportedError,
)
from adapterkit.keys import Role

if TYPE_CHECKING:
    from pathlib import Path

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
KERNEL = "down_blocks.0.resnets.0.conv1"
ONE = "down_blocks.0.attentions.0.proj_in"
SHAPES = {LINEAR: (64, 8), KERNEL: (8, 8, 3, 3), ONE: (8, 8, 1, 1)}
STORED = "unet/diffusion_pytorch_model.safetensors"
Tensors = dict[str, "np.ndarray[Any, np.dtype[Any]]"]


def stem(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


def columns() -> Tensors:
    tensors = kohya({stem(module): shape for module, shape in SHAPES.items()}, rank=2, alpha=1)
    for module, (_, inputs, *kernel) in SHAPES.items():
        tensors[f"{stem(module)}.dora_scale"] = np.abs(drawn(1, inputs, *[1] * len(kernel))) + 1
    return tensors


def merged(weight: Any, change: Any, magnitude: Any, share: float = 1.0) -> Any:
    moved = weight + change.reshape(weight.shape)
    axes = tuple(axis for axis in range(moved.ndim) if axis != 1)
    scaled = magnitude * moved / np.sqrt((moved**2).sum(axis=axes, keepdims=True))
    return weight + share * (scaled - weight)


def test_magnitudes_by_column_go_through_kohya_and_comfyui_bit_for_bit(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", columns())
    adapter = read(source)
    held = {key.module: t for key, t in adapter.tensors.items() if key.role.startswith("column")}
    assert {t.shape for t in held.values()} == {(8,)}
    assert len(held) == len(SHAPES)
    assert not any(key.role is Role.MAGNITUDE for key in adapter.tensors)
    adapterkit.convert(source, tmp_path / "b.safetensors", to="comfyui")
    adapterkit.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
    assert contents(tmp_path / "c.safetensors") == contents(source)
    assert "DoRA magnitudes by column" in str(adapterkit.inspect(source))


@pytest.mark.parametrize("name", ["b.safetensors", "peft", "mlx"])
def test_formats_whose_magnitudes_are_of_rows_refuse_them(name: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", columns())
    to = "diffusers" if name == "b.safetensors" else name
    with pytest.raises(LossyConversionError, match="DoRA by column has a place in kohya"):
        adapterkit.convert(source, tmp_path / name, to=to)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_columns_are_merged_into_a_directory(share: float, tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", "sd")
    tensors = columns()
    source = saved(tmp_path / "a.safetensors", tensors)
    adapterkit.merge_into([source], base, tmp_path / "out", weights=[share])
    before, after = (load_file(folder / STORED) for folder in (base, tmp_path / "out"))
    for module in SHAPES:
        weight = before[f"{module}.weight"].double().numpy()
        magnitude = tensors[f"{stem(module)}.dora_scale"].astype("float64")
        magnitude = magnitude.reshape(1, -1, *[1] * (weight.ndim - 2))
        want = merged(weight, update(tensors, stem(module)), magnitude, share)
        assert np.allclose(after[f"{module}.weight"].numpy(), want, rtol=1e-5, atol=1e-6), module


def test_columns_stay_where_rows_are_swapped(tmp_path: Path) -> None:
    """Of Flux's last modulation diffusers swaps halves of rows, which changes no column's norm."""
    name = "final_layer.adaLN_modulation.1"
    tensors = kohya({stem(name): (32, 16)}, rank=2, alpha=1)
    tensors[f"{stem(name)}.dora_scale"] = np.abs(drawn(1, 16)) + 1
    # The module stands in several models: a block says which.
    tensors |= kohya({stem("double_blocks.0.img_mod.lin"): (96, 16)}, rank=2)
    said = {"modelspec.architecture": "flux-1-dev/lora"}
    source = saved(tmp_path / "a.safetensors", tensors, said)
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    base = tmp_path / "base.safetensors"
    beside = {"double_blocks.0.img_mod.lin.weight": torch.zeros(96, 16)}
    save_file({f"{name}.weight": weight, **beside}, base)
    adapterkit.merge_into([source], base, tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")[f"{name}.weight"].numpy()
    magnitude = tensors[f"{stem(name)}.dora_scale"].astype("float64")
    want = merged(weight.double().numpy(), update(tensors, stem(name)), magnitude)
    assert np.allclose(got, want, rtol=1e-5, atol=1e-6)
    adapterkit.convert(source, tmp_path / "b.safetensors", to="comfyui")
    adapterkit.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
    assert contents(tmp_path / "c.safetensors") == contents(source)


def test_columns_of_a_fused_layer_are_refused_by_name(tmp_path: Path) -> None:
    """The norm of a column is that of queries, keys and values together."""
    name = stem("double_blocks.0.img_attn.qkv")
    tensors = kohya({name: (48, 16)}, rank=2, alpha=1)
    tensors[f"{name}.dora_scale"] = np.abs(drawn(1, 16)) + 1
    said = {"modelspec.architecture": "flux-1-dev/lora"}
    with pytest.raises(UnsupportedError, match=r"img_attn_qkv.*all rows of a fused layer"):
        read(saved(tmp_path / "a.safetensors", tensors, said))


def test_columns_of_parts_have_no_place_where_they_are_fused(tmp_path: Path) -> None:
    """OneTrainer trains diffusers' split layers; the single file has them in one."""
    names = [f"lora_transformer_transformer_blocks_0_attn_to_{part}" for part in "qkv"]
    tensors = kohya(dict.fromkeys(names, (16, 16)), rank=2, alpha=1)
    tensors |= {f"{name}.dora_scale": np.abs(drawn(1, 16)) + 1 for name in names}
    said = {"modelspec.architecture": "flux-1-dev/lora"}
    source = saved(tmp_path / "a.safetensors", tensors, said)
    with pytest.raises(LossyConversionError, match="norm of all rows of a layer"):
        adapterkit.convert(source, tmp_path / "b.safetensors", to="kohya")
    base = tmp_path / "base.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.randn(48, 16)}, base)
    with pytest.raises(IncompatibleBaseError, match="all rows of a fused layer"):
        adapterkit.merge_into([source], base, tmp_path / "out.safetensors")
    pipeline(tmp_path / "flux", "flux")
    report = adapterkit.merge_into([source], tmp_path / "flux", tmp_path / "out")
    assert len(report.tensors) == 3


def test_columns_without_a_base_are_no_update(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", columns())
    with pytest.raises(UnsupportedError, match="depends on the base weights"):
        adapterkit.merge([source, source])
    assert "without their magnitude" in str(adapterkit.audit(source))


def test_magnitudes_that_fit_no_side_are_refused(tmp_path: Path) -> None:
    tensors = columns()
    tensors[f"{stem(LINEAR)}.dora_scale"] = drawn(1, 9)
    with pytest.raises(UnsupportedError, match=r"8 inputs, and magnitudes of shape \[1, 9\]"):
        read(saved(tmp_path / "a.safetensors", tensors))


def test_loaders_do_with_columns_what_they_are_said_to(tmp_path: Path) -> None:
    """ComfyUI divides by the norms of W + ΔW there, unlike by row; diffusers drops dora_scale."""
    source = saved(tmp_path / "a.safetensors", columns())
    report = adapterkit.validate(source, targets=["comfyui", "diffusers"])
    for target in report.targets:
        assert {module.outcome for module in target.modules} == {Outcome.APPLIED}
    codes = {(finding.engine, finding.code) for finding in report.findings}
    assert ("diffusers", "DIF003") in codes
    assert not any(code == "CUI002" for _, code in codes)
