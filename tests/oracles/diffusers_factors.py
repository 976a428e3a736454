"""Factors of diffusers' own adapters."""

from __future__ import annotations

from typing import Any

import torch
from diffusion_models import FAMILIES


def factors(name: str, *, alpha: float) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return A and B for every layer, at a scale that the metadata say."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(5)
    found: dict[str, torch.Tensor] = {}
    for module, layer in family.model().named_modules():
        kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
        # PEFT merges no convolution of several groups.
        if isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1:
            rows, *columns = layer.weight.shape
            stem = f"{family.component}.{module}"
            ones = [1] * (len(columns) - 1)
            found[f"{stem}.lora_A.weight"] = torch.randn(2, *columns, generator=generator)
            found[f"{stem}.lora_B.weight"] = torch.randn(rows, 2, *ones, generator=generator)
    component = family.component
    settings = f'{{"{component}.r": 2, "{component}.lora_alpha": {alpha}}}'
    return found, {"lora_adapter_metadata": settings}


def dense(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")].double()
            update = scale * torch.tensordot(b.reshape(len(b), -1), a.double(), dims=1)
            found[key.removesuffix(".lora_A.weight")] = update.numpy()
    return found
