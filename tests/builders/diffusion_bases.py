"""Tiny diffusion models as they lie on disk: pipelines of diffusers, single files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from diffusers_factors import dense, factors
from diffusion_models import FAMILIES, clip
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.formats.diffusion.table import models

if TYPE_CHECKING:
    from pathlib import Path

TOLD = {"z_image": "zimage", "hunyuan_video": "hunyuan-video"}


def pipeline(folder: Path, name: str) -> Path:
    """Save a tiny pipeline of a denoiser and a text encoder, with a part that nobody adapts."""
    component = FAMILIES[name].component
    FAMILIES[name].model().save_pretrained(folder / component)
    clip().save_pretrained(folder / "text_encoder")
    index = {"_class_name": "Tiny", component: ["diffusers", FAMILIES[name].cls]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "vae": ["diffusers", "Vae"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae").mkdir()
    save_file({"w": torch.ones(3)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def checkpoint(path: Path, name: str, prefix: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save random weights under a model's original names, of the sizes that an adapter has."""
    tensors, metadata = factors(name, alpha=2)
    told = {"modelspec.architecture": TOLD.get(name, name)}
    save_file(tensors, path.with_name("shapes.safetensors"), metadata | told)
    written = path.with_name("original.safetensors")
    adapterkit.convert(path.with_name("shapes.safetensors"), written, to="comfyui", force=True)
    names = next(model.names for model in models() if model.name == name)
    generator = torch.Generator().manual_seed(2)
    found: dict[str, torch.Tensor] = {}
    for stem, change in dense(load_file(written), 1.0).items():
        site = names.original(stem.removeprefix("diffusion_model."))
        assert site is not None
        found[site.published] = torch.randn(change.shape, generator=generator)
    save_file({f"{prefix}{key}.weight": x for key, x in found.items()}, path)
    return path, found
