"""diffusers judges: what its own loaders make of our files, in tiny models of every kind.

Every linear layer and convolution of a model gets factors; the file goes through every spelling.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import lora_pipeline, single_file_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

import adapterkit

BLOCKS = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4}
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd": (
        "StableDiffusionLoraLoaderMixin",
        "UNet2DConditionModel",
        UNET
        | {
            "block_out_channels": (8, 16, 16, 16),
            "down_block_types": [x.format("Down") for x in (CROSS, CROSS, CROSS, PLAIN)],
            "up_block_types": [x.format("Up") for x in (PLAIN, CROSS, CROSS, CROSS)],
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
        },
    ),
    "sdxl": (
        "StableDiffusionXLLoraLoaderMixin",
        "UNet2DConditionModel",
        UNET
        | {
            "block_out_channels": (8, 16, 16),
            "down_block_types": [x.format("Down") for x in (PLAIN, CROSS, CROSS)],
            "up_block_types": [x.format("Up") for x in (CROSS, CROSS, PLAIN)],
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (1, 2, 2),
            "cross_attention_dim": 32,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        },
    ),
    "flux": (
        "FluxLoraLoaderMixin",
        "FluxTransformer2DModel",
        BLOCKS
        | {
            "patch_size": 1,
            "in_channels": 4,
            "num_single_layers": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
    "flux2": (
        "Flux2LoraLoaderMixin",
        "Flux2Transformer2DModel",
        BLOCKS
        | {
            "patch_size": 1,
            "in_channels": 4,
            "num_single_layers": 2,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 8,
            "mlp_ratio": 3.0,
            "axes_dims_rope": (2, 2, 2, 2),
        },
    ),
    "wan": (
        "WanLoraLoaderMixin",
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 8,
            "out_channels": 4,
            "text_dim": 10,
            "freq_dim": 8,
            "ffn_dim": 40,
            "num_layers": 2,
            "image_dim": 14,
            "added_kv_proj_dim": 24,
        },
    ),
    "qwen": (
        "QwenImageLoraLoaderMixin",
        "QwenImageTransformer2DModel",
        BLOCKS
        | {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 12,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
}
# Read by diffusers' own converter of kohya's names at any size, alphas of one rank being one.
KOHYA = ("sd", "sdxl")


def model(name: str) -> Any:
    torch.manual_seed(3)
    return getattr(diffusers, MODELS[name][1])(**MODELS[name][2]).double()


def component(name: str) -> str:
    return "unet" if MODELS[name][1].startswith("UNet") else "transformer"


def factors(name: str, *, alpha: float) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return A and B for every layer, at a scale that the metadata say."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, torch.Tensor] = {}
    for module, layer in model(name).named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            rows, *columns = layer.weight.shape
            stem = f"{component(name)}.{module}"
            ones = [1] * (len(columns) - 1)
            found[f"{stem}.lora_A.weight"] = torch.randn(2, *columns, generator=generator)
            found[f"{stem}.lora_B.weight"] = torch.randn(rows, 2, *ones, generator=generator)
    settings = f'{{"{component(name)}.r": 2, "{component(name)}.lora_alpha": {alpha}}}'
    return found, {"lora_adapter_metadata": settings}


def loaded(name: str, path: Path) -> dict[str, Any]:
    """Return ΔW of every module that diffusers changes, in float64."""

    class Pipeline(getattr(lora_pipeline, MODELS[name][0])):
        hf_device_map = None

    pipeline: Any = Pipeline()
    network = model(name).float()
    setattr(pipeline, component(name), network)
    pipeline.text_encoder = pipeline.text_encoder_2 = pipeline.transformer_2 = None
    pipeline.components = {component(name): network}
    pipeline.load_lora_weights(str(path), adapter_name="a")
    network.double()
    found: dict[str, Any] = {}
    with torch.no_grad():
        for module, layer in network.named_modules():
            if isinstance(layer, BaseTunerLayer):
                base: Any = layer.get_base_layer()
                before = base.weight.clone()
                layer.merge()
                found[f"{component(name)}.{module}"] = (base.weight - before).numpy()
                layer.unmerge()
    return found


def dense(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")].double().reshape(-1, 2)
            update = scale * torch.tensordot(b, a.double(), dims=1)
            found[key.removesuffix(".lora_A.weight")] = update.numpy()
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("alpha", [2.0, 0.7])
def test_diffusers_makes_the_same_update_of_our_files(
    name: str, alpha: float, tmp_path: Path
) -> None:
    tensors, metadata = factors(name, alpha=alpha)
    path = tmp_path / "0.safetensors"
    save_file(tensors, path, metadata)
    for number, spelling in enumerate(("kohya", "comfyui", "diffusers"), 1):
        source, path = path, tmp_path / f"{number}.safetensors"
        adapterkit.convert(source, path, to=spelling)
    want = dense(tensors, alpha / 2)
    judged = [path, *([tmp_path / "1.safetensors"] if name in KOHYA else [])]
    for file in judged:
        got = loaded(name, file)
        assert got.keys() == want.keys()
        for module, update in want.items():
            assert np.linalg.norm(got[module] - update) <= 1e-6 * np.linalg.norm(update), module


class Checkpoint(dict[str, torch.Tensor]):
    """A checkpoint of original names in which what nobody adapted is zero."""

    def pop(self, key: str, *default: Any) -> torch.Tensor:
        rows = 7 * 16 if ".linear1." in key else 6 * 16
        return super().pop(key, *default or (torch.zeros(rows, 1),))


# The width that diffusers has written into its converter is that of the real model.
CONVERTERS = {
    "flux": ("convert_flux_transformer_checkpoint_to_diffusers", "inner_dim = 3072"),
    "flux2": ("convert_flux2_transformer_checkpoint_to_diffusers", ""),
    "wan": ("convert_wan_transformer_to_diffusers", ""),
}


def converter(name: str) -> Any:
    function, width = CONVERTERS[name]
    source = inspect.getsource(getattr(single_file_utils, function))
    assert width in source
    scope = dict(vars(single_file_utils))
    exec(source.replace(width, "inner_dim = 16") if width else source, scope)  # noqa: S102
    return scope[function]


@pytest.mark.parametrize("name", CONVERTERS)
def test_original_names_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    """A dense update in original names is a checkpoint, which diffusers converts."""
    tensors, metadata = factors(name, alpha=2.0)
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    adapterkit.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfyui")
    checkpoint = Checkpoint()
    stored = load_file(tmp_path / "b.safetensors")
    for key, a in stored.items():
        if key.endswith(".lora_A.weight"):
            b = stored[key.replace("lora_A", "lora_B")].double()
            update = torch.tensordot(b.reshape(len(b), -1), a.double(), dims=1)
            stem = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
            checkpoint[f"{stem}.weight"] = update
    got = converter(name)(checkpoint)
    for module, update in dense(tensors, 1.0).items():
        found = got[f"{module.removeprefix('transformer.')}.weight"].numpy()
        assert np.linalg.norm(found - update) <= 1e-6 * np.linalg.norm(update), module
