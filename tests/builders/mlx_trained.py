"""Models of which MLX adapters are written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

if TYPE_CHECKING:
    from pathlib import Path


def llama(folder: Path, *, tied: bool) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tuned(base: Path, folder: Path, model_class: Any = LlamaForCausalLM, **settings: Any) -> Any:
    """Save an adapter with random values everywhere, and return the model that carries it."""
    torch.manual_seed(1)
    config = LoraConfig(**{"init_lora_weights": False, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(model_class.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def without_base(folder: Path) -> None:
    """Take out the path by which the base would be found."""
    path = folder / "adapter_config.json"
    known = json.loads(path.read_text()) | {"base_model_name_or_path": "nobody/base"}
    path.write_text(json.dumps(known))
