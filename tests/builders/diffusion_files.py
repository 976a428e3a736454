"""LoRA files of small diffusion models as their trainers write them, and their dense updates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from adapterkit.containers.safetensors import read_safetensors
from adapterkit.formats.diffusion.format import KOHYA
from adapterkit.formats.protocol import FormatOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.model import AdapterTensorSet

    Array = np.ndarray[Any, np.dtype[Any]]

WIDTH = 16
# module -> (out, in), with the names that sd-scripts gives them
FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (3 * WIDTH, WIDTH),
    "lora_unet_double_blocks_0_txt_attn_qkv": (3 * WIDTH, WIDTH),
    "lora_unet_double_blocks_1_img_attn_proj": (WIDTH, WIDTH),
    "lora_unet_double_blocks_1_img_mlp_0": (4 * WIDTH, WIDTH),
    "lora_unet_double_blocks_1_txt_mlp_2": (WIDTH, 4 * WIDTH),
    "lora_unet_double_blocks_0_img_mod_lin": (6 * WIDTH, WIDTH),
    "lora_unet_single_blocks_0_linear1": (7 * WIDTH, WIDTH),
    "lora_unet_single_blocks_0_linear2": (WIDTH, 5 * WIDTH),
    "lora_unet_single_blocks_0_modulation_lin": (3 * WIDTH, WIDTH),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (16, 16),
}
SDXL = {
    "lora_unet_input_blocks_4_1_proj_in": (16, 16),
    "lora_unet_input_blocks_7_1_transformer_blocks_1_attn2_to_k": (16, 32),
    "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj": (128, 16),
    "lora_unet_output_blocks_5_1_transformer_blocks_0_attn1_to_out_0": (16, 16),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (32, 16),
    "lora_te2_text_model_encoder_layers_1_self_attn_out_proj": (24, 24),
}
# module -> (out, in, kernel)
SDXL_CONVOLUTIONS = {
    "lora_unet_input_blocks_4_0_in_layers_2": (16, 8, 3, 3),
    "lora_unet_input_blocks_3_0_op": (8, 8, 3, 3),
    "lora_unet_output_blocks_2_2_conv": (16, 16, 3, 3),
    "lora_unet_middle_block_0_skip_connection": (16, 16, 1, 1),
}


def drawn(*shape: int, dtype: str = "float32") -> Array:
    values = np.random.default_rng(sum(shape)).standard_normal(shape)
    return (values * 0.3).astype(dtype)


def kohya(
    modules: Mapping[str, tuple[int, ...]], rank: int = 2, alpha: float | None = None
) -> dict[str, Array]:
    """Return the tensors of a kohya file; without alpha, the scale is 1."""
    generator = np.random.default_rng(7)
    found: dict[str, Array] = {}
    for stem, (rows, columns, *kernel) in modules.items():
        down = generator.standard_normal((rank, columns, *kernel)) * 0.3
        up = generator.standard_normal((rows, rank, *[1] * len(kernel))) * 0.3
        found[f"{stem}.lora_down.weight"] = down.astype("float32")
        found[f"{stem}.lora_up.weight"] = up.astype("float32")
        found[f"{stem}.alpha"] = np.array(rank if alpha is None else alpha, "float32")
    return found


SPELLINGS = ("kohya", "diffusers", "comfyui")
FILES = {"flux": kohya(FLUX), "sdxl": kohya({**SDXL, **SDXL_CONVOLUTIONS})}
# What a Flux file says of its model, and modules of three models in kohya's spelling.
FLUX_SAID = {"modelspec.architecture": "flux-1-dev/lora"}
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
SD = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def close(got: Any, want: Any) -> bool:
    """Tell whether two arrays are the same to 1e-6 of the second's norm."""
    return bool(np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want))


def saved(path: Path, tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: x.copy(order="C") for name, x in tensors.items()}, path, metadata)
    return path


def read(path: Path) -> AdapterTensorSet:
    return KOHYA.read(path, FormatOptions())


def dense(adapter: AdapterTensorSet) -> dict[str, Array]:
    """Return ΔW in float64 by module."""
    found: dict[str, Array] = {}
    for pair in adapter.pairs():
        ((b, a),) = pair.matrices()
        found[pair.module] = pair.scale * (b @ a).reshape(pair.shape)
    return found


def update(tensors: Mapping[str, Array], stem: str) -> Array:
    """Return the dense ΔW of a module of a kohya file, in float64."""
    down = tensors[f"{stem}.lora_down.weight"].astype("float64")
    up = tensors[f"{stem}.lora_up.weight"].astype("float64")
    rank = len(down)
    alpha = float(tensors.get(f"{stem}.alpha", np.array(rank)))
    return alpha / rank * np.tensordot(up.reshape(len(up), rank), down, axes=1)


def contents(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return every tensor of a file, bit for bit."""
    tensors = read_safetensors(path).tensors
    return {name: (str(t.dtype), t.shape, bytes(t.tobytes())) for name, t in tensors.items()}
