"""What tests of merging into checkpoints share."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
from checkpoint_bases import (
    tensors,
)

if TYPE_CHECKING:
    from pathlib import Path


def load_file(path: Path) -> dict[str, Any]:
    return tensors.load_file(path)


def dense(
    base: Path, adapters: dict[Path, float], *, sizes: bool = False
) -> dict[str, np.ndarray[Any, Any]]:
    """Return W + Σ w s B A of every adapted weight in float64, from the files alone.

    With `sizes` the magnitudes of all terms are summed, |W| + Σ |w s B| |A|.
    """
    merged: dict[str, np.ndarray[Any, Any]] = {}
    weights: dict[str, Any] = {}
    for file in base.glob("*.safetensors"):
        weights |= load_file(file)
    for adapter, weight in adapters.items():
        config = json.loads((adapter / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"]
        factors = load_file(adapter / "adapter_model.safetensors")
        for name, a in factors.items():
            if "lora_A" not in name:
                continue
            b = weight * scale * factors[name.replace("lora_A", "lora_B")].double().numpy()
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            terms = [weights[target].double().numpy(), b, a.double().numpy()]
            start, left, right = [np.abs(term) for term in terms] if sizes else terms
            merged[target] = merged.get(target, start) + left @ right
    return merged


def edited(source: Path, target: Path, change: Any) -> Path:
    """Copy an adapter or a base with its tensors changed."""
    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors.save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return target
