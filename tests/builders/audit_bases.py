"""Adapters held against their bases."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
import transformers

from adapterkit import BaseAudit, WeightAudit

if TYPE_CHECKING:
    from pathlib import Path

    from engine import BaseFixture


Array = np.ndarray[Any, np.dtype[np.float64]]


# transformers and peft have no types that a strict checker can follow.
hub: Any = transformers


lora: Any = peft
randomness: Any = torch


def tuned(base: BaseFixture, folder: Path, **settings: Any) -> Any:
    """Save a random adapter of a base; return the live model."""
    model = hub.AutoModelForCausalLM.from_pretrained(base.hf, dtype=torch.float32)
    config = lora.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings},
        fan_in_fan_out=base.row.name == "gpt2",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        randomness.manual_seed(3)
        live = lora.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.rand(parameter.shape))
        live.save_pretrained(folder, save_embedding_layers=False)
    return live


def found_by_name(report: Any) -> dict[str, WeightAudit]:
    base = report.adapters[0].base
    assert isinstance(base, BaseAudit)
    assert base.not_compared == ()
    return {row.name: row for row in base.weights}
