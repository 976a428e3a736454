"""Diffusion models as bases: merged into and extracted from, as directories and as single files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers_factors import dense, factors
from diffusers_loaders import converted
from diffusion_bases import TOLD, checkpoint, pipeline
from diffusion_files import drawn, kohya, saved, update
from diffusion_models import FAMILIES
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.errors import DestinationExistsError, IncompatibleBaseError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated"), pytest.mark.slow]
ALPHA = 0.7


def adapter(path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    tensors, metadata = factors(name, alpha=ALPHA)
    save_file(tensors, path, metadata | {"modelspec.architecture": TOLD.get(name, name)})
    return path, dense(tensors, ALPHA / 2)


@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "wan"])
def test_adapters_are_merged_into_a_directory_of_diffusers(
    name: str, spelling: str, tmp_path: Path
) -> None:
    base = pipeline(tmp_path / "base", name)
    source, want = adapter(tmp_path / "a.safetensors", name)
    adapterkit.convert(source, tmp_path / "b.safetensors", to=spelling)
    adapterkit.merge_into([tmp_path / "b.safetensors"], base, tmp_path / "out")
    component = FAMILIES[name].component
    before, after = (
        getattr(__import__("diffusers"), FAMILIES[name].cls).from_pretrained(folder / component)
        for folder in (base, tmp_path / "out")
    )
    for module, layer in before.named_modules():
        if getattr(layer, "weight", None) is not None:
            change = (after.get_submodule(module).weight - layer.weight).detach().numpy()
            expected = want.get(f"{component}.{module}", np.zeros_like(change))
            assert np.allclose(change, expected, atol=2e-6), module
    for path in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (tmp_path / "out" / path).read_bytes() == (base / path).read_bytes()
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["flux", "sd3", "z_image", "hunyuan_video", "lumina2"])
def test_adapters_are_merged_into_a_single_file(name: str, prefix: str, tmp_path: Path) -> None:
    base, weights = checkpoint(tmp_path / "base.safetensors", name, prefix)
    source, want = adapter(tmp_path / "a.safetensors", name)
    adapterkit.merge_into([source], base, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == load_file(base).keys()
    changes = {key: merged[f"{prefix}{key}.weight"].double() - x for key, x in weights.items()}
    got = converted(name, changes)
    for module, change in want.items():
        assert np.allclose(got[module].reshape(change.shape), change, atol=2e-6), module


def test_text_encoders_of_a_single_file_have_their_own_names(tmp_path: Path) -> None:
    """SDXL's second encoder is stored as OpenCLIP names it, its attention in one parameter."""
    layer = "text_model.encoder.layers.1"
    open_clip = "conditioner.embedders.1.model.transformer.resblocks.1"
    weights = {
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": torch.randn(8, 8),
        f"conditioner.embedders.0.transformer.{layer}.mlp.fc1.weight": torch.randn(16, 8),
        f"{open_clip}.attn.in_proj_weight": torch.randn(24, 8),
        f"{open_clip}.mlp.c_proj.weight": torch.randn(8, 16),
    }
    save_file(weights, tmp_path / "base.safetensors")
    places = {
        "lora_unet_input_blocks_4_1_proj_in": (8, 8),
        "lora_te1_text_model_encoder_layers_1_mlp_fc1": (16, 8),
        "lora_te2_text_model_encoder_layers_1_self_attn_k_proj": (8, 8),
        "lora_te2_text_model_encoder_layers_1_mlp_fc2": (8, 16),
    }
    tensors = kohya(places, rank=2, alpha=1)
    source = saved(tmp_path / "a.safetensors", tensors)
    adapterkit.merge_into([source], tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    changes = {name: (merged[name].double() - x).numpy() for name, x in weights.items()}
    proj, first, attention, last = changes.values()
    want = [update(tensors, stem) for stem in places]
    attention_want = np.concatenate([np.zeros((8, 8)), want[2], np.zeros((8, 8))])
    for got, each in zip(
        (proj, first, attention, last), (want[0], want[1], attention_want, want[3]), strict=True
    ):
        assert np.allclose(got, each, atol=1e-6)


@pytest.mark.parametrize("axes", [(), (1, 1)])
def test_a_convolution_of_size_1_is_a_linear_layer(axes: tuple[int, ...], tmp_path: Path) -> None:
    """SD 1 has convolutions where SD 2 has linear layers; files hold the factors of either."""
    base = pipeline(tmp_path / "base", "sd")
    module = "down_blocks.0.attentions.0.proj_in"
    stem = f"lora_unet_{module.replace('.', '_')}"
    tensors = kohya({stem: (8, 8, *axes)}, rank=2, alpha=1)
    source = saved(tmp_path / "a.safetensors", tensors)
    report = adapterkit.validate(source, base=base, targets=["comfyui"])
    assert report.findings == ()
    adapterkit.merge_into([source], base, tmp_path / "out")
    stored = "unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / stored) for folder in (base, tmp_path / "out"))
    change = (after[f"{module}.weight"] - before[f"{module}.weight"]).numpy()
    assert np.allclose(change.reshape(8, 8), update(tensors, stem).reshape(8, 8), atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_dora_goes_into_fused_attention(prefix: str, tmp_path: Path) -> None:
    """W' = m V / ‖V‖ by row, with V = W + ΔW, of the parts of a fused weight together."""
    place = "double_blocks.0.img_attn.qkv"
    stem = f"lora_unet_{place.replace('.', '_')}"
    weight = torch.randn(48, 16)
    save_file({f"{prefix}{place}.weight": weight}, tmp_path / "base.safetensors")
    tensors = kohya({stem: (48, 16)}, rank=2, alpha=1)
    tensors[f"{stem}.dora_scale"] = np.abs(drawn(48, 1)) + 1
    source = saved(tmp_path / "a.safetensors", tensors)
    adapterkit.convert(source, tmp_path / "b.safetensors", to="diffusers")
    for number, file in enumerate((source, tmp_path / "b.safetensors")):
        out = tmp_path / f"{number}.safetensors"
        adapterkit.merge_into([file], tmp_path / "base.safetensors", out)
        moved = weight.double().numpy() + update(tensors, stem)
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        want = tensors[f"{stem}.dora_scale"] * moved / norms
        got = load_file(out)[f"{prefix}{place}.weight"].numpy()
        assert np.allclose(got, want, atol=1e-5)


def test_an_existing_model_is_replaced_only_when_asked(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", "sd")
    source, _ = adapter(tmp_path / "a.safetensors", "sd")
    adapterkit.merge_into([source], base, tmp_path / "out")
    before = (tmp_path / "out/unet/diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(DestinationExistsError):
        adapterkit.merge_into([source], base, tmp_path / "out")
    adapterkit.merge_into([source], base, tmp_path / "out", weights=[0.5], force=True)
    assert (tmp_path / "out/unet/diffusion_pytorch_model.safetensors").read_bytes() != before
    assert (tmp_path / "out/vae/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_what_was_merged_into_a_directory_is_extracted_again(name: str, tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", name)
    source, want = adapter(tmp_path / "a.safetensors", name)
    adapterkit.merge_into([source], base, tmp_path / "out")
    path = tmp_path / "again.safetensors"
    adapterkit.extract(base, tmp_path / "out", path, to="diffusers")
    assert_extracted(path, want)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_what_was_merged_into_a_file_is_extracted_again(name: str, tmp_path: Path) -> None:
    base, _ = checkpoint(tmp_path / "base.safetensors", name, "model.diffusion_model.")
    source, want = adapter(tmp_path / "a.safetensors", name)
    adapterkit.merge_into([source], base, tmp_path / "out.safetensors")
    path = tmp_path / "again.safetensors"
    adapterkit.extract(base, tmp_path / "out.safetensors", path, to="kohya")
    assert_extracted(path, want)


def assert_extracted(path: Path, want: dict[str, Any]) -> None:
    got = {
        pair.module: pair.scale * (b @ a).reshape(pair.shape)
        for pair in adapterkit.read(path).pairs()
        for ((b, a),) in [pair.matrices()]
    }
    assert got.keys() == want.keys()
    for module, change in want.items():
        assert np.linalg.norm(got[module] - change) <= 2e-5 * np.linalg.norm(change), module


def test_another_model_is_refused(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", "sd")
    source, _ = adapter(tmp_path / "a.safetensors", "sdxl")
    with pytest.raises(IncompatibleBaseError):
        adapterkit.merge_into([source], base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
