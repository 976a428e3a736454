"""Quantised Hugging Face checkpoints, written by torch: values and scales of every layout."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from adapterkit.base import open_base
from adapterkit.base.quantised import decoded
from adapterkit.base.schemes import Scheme, quantisation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "float", "num_bits": 8, "strategy": "channel"},
            "input_activations": {"type": "float", "num_bits": 8, "dynamic": True},
        }
    },
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}}

Tensors = dict[str, torch.Tensor]
FP8_MAX = 448.0


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and scales, (..., ceil(rows / height), ceil(columns / width)), of a matrix."""
    (height, width), (rows, columns) = block, weight.shape[-2:]
    grid = (*weight.shape[:-2], -(-rows // height), -(-columns // width))
    scales = torch.empty(grid)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid[-2]):
        for j in range(grid[-1]):
            place = (
                ...,
                slice(i * height, (i + 1) * height),
                slice(j * width, (j + 1) * width),
            )
            scale = weight[place].float().abs().amax(dim=(-2, -1)) / FP8_MAX
            scales[..., i, j] = scale
            values[place] = (weight[place].float() / scale[..., None, None]).to(values.dtype)
    return values, scales


def expanded(scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """Return the scale of every element, by torch's own repetition."""
    rows = scales.float().repeat_interleave(block[0], dim=-2)[..., : shape[-2], :]
    return rows.repeat_interleave(block[1], dim=-1)[..., : shape[-1]]


def random_mxfp4(shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks and scales of (E, out, in), of every code and of plausible sizes."""
    experts, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    size = (experts, rows, columns // 32, 16)
    blocks = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 122, size[:3], generator=generator, dtype=torch.uint8)
    return blocks, scales


def quantised(
    base: Path,
    folder: Path,
    config: Mapping[str, Any],
    store: Callable[[str, torch.Tensor], Tensors | None],
) -> Path:
    """Write a copy of a base in which `store` has its way with every tensor; None keeps one."""
    shutil.copytree(base, folder)
    stored: Tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        made = store(name, tensor)
        stored |= {name: tensor} if made is None else made
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=config)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | fields))


def sharded(folder: Path, where: Callable[[str], int]) -> None:
    """Spread a checkpoint over files by what `where` says of each name."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: dict[int, Tensors] = {}
    for name, tensor in whole.items():
        shards.setdefault(where(name), {})[name] = tensor
    files = {number: f"model-{number:05}-of-{len(shards):05}.safetensors" for number in shards}
    for number, held in shards.items():
        save_file(held, folder / files[number], metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in whole.values())},
        "weight_map": {name: files[where(name)] for name in whole},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def stored_alone(
    base: Path, folder: Path, config: dict[str, Any], extra: dict[str, torch.Tensor]
) -> Path:
    """Write a base that holds some tensors in place of its own of these names."""
    target = quantised(base, folder / "base", config, lambda *_: None)
    held = load_file(target / "model.safetensors") | extra
    save_file(held, target / "model.safetensors", metadata={"format": "pt"})
    return target


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def logical(folder: Path) -> dict[str, Any]:
    """Return the tensors that adapterkit sees in a quantised base."""
    base = open_base(folder)
    scheme = quantisation(base)
    assert isinstance(scheme, Scheme)
    return dict(decoded(base, scheme).base.tensors)
