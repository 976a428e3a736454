"""Models adapted by PEFT's other tuners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "down_proj"]


def tuned(kind: str, base: Path, folder: Path, model_class: Any = None, **settings: Any) -> Path:
    """Save an adapter whose trained tensors are all random, as PEFT saves it."""
    torch.manual_seed(1)
    config = getattr(peft, f"{kind}Config")(**{"target_modules": TARGETS, **settings})
    model = get_peft_model((model_class or LlamaForCausalLM).from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


FIXTURES = Path(__file__).parents[2] / "fixtures"
