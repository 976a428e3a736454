"""A llama of two layers and width 32, with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def saved_llama(
    folder: Path, change: Callable[[Any], None] | None = None, *, tied: bool = False
) -> Path:
    """Save the model, changed before; return its folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    if change:
        change(model)
    model.save_pretrained(folder)
    return folder
