"""A llama of two layers and width 32, with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small_llama(seed: int = 0, **settings: Any) -> Any:
    """Return the model; settings of its configuration go over its own."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings})).eval()


def saved_llama(
    folder: Path, change: Callable[[Any], None] | None = None, seed: int = 0, **settings: Any
) -> Path:
    """Save the model, changed before; return its folder."""
    model = small_llama(seed, **settings)
    if change:
        change(model)
    model.save_pretrained(folder)
    return folder
