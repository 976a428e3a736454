"""Checkpoints to merge into, small, and adapters that PEFT trained on them."""

from __future__ import annotations

import shutil
import warnings
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from safetensors import torch as safetensors_torch

if TYPE_CHECKING:
    from pathlib import Path

    from engine import BaseFixture

# What is left between two ways to compute the same in float32, in nats; updates move far more.
EQUAL, EFFECT = 1e-9, 1e-2


# transformers and peft have no types that a strict checker can follow.
hub: Any = transformers


lora: Any = peft


tensors: Any = safetensors_torch


def loaded(path: Path) -> Any:
    return hub.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32
    ).eval()


def trained(base: BaseFixture, folder: Path, *, seed: int = 1, **settings: Any) -> Any:
    """Save an adapter, all of whose trained tensors are random; return the live model."""
    model = loaded(base.hf)
    config = lora.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "init_lora_weights": False,
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": base.row.name == "gpt2",
            **settings,
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", r"Adapter 'default': \d+ LoRA tensor")
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # what PEFT itself draws
            tuned = lora.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    if "magnitude" in name:
                        parameter.mul_(1 + 0.3 * noise)
                    else:
                        parameter.add_(0.1 * noise)
        tuned.save_pretrained(folder, save_embedding_layers=False)
    return tuned.eval()


LINEAR = ["q_proj", "k_proj", "o_proj", "down_proj"]


def bf16_base(base: BaseFixture, folder: Path, **settings: Any) -> Path:
    model = loaded(base.hf).to(torch.bfloat16)
    model.save_pretrained(folder, **settings)
    return folder


def fused_base(base: BaseFixture, folder: Path) -> Path:
    """Write the weights as the live model names them: experts in one parameter."""
    shutil.copytree(base.hf, folder)
    state = {name: x.contiguous() for name, x in base.model.state_dict().items()}
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in state)
    tensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
