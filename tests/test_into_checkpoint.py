"""Merged into a Hugging Face base, adapters give the logits that PEFT gives with them active."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
import transformers
from engine import BaseFixture, family_row, logprobs, make_adapter, make_base, max_kl, prompts_for
from safetensors.torch import load_file, save_file

from adapterkit.errors import (
    DestinationExistsError,
    FormatError,
    IncompatibleBaseError,
    UnsupportedError,
    UsageError,
)
from adapterkit.merge.into import merge_into

if TYPE_CHECKING:
    from pathlib import Path

# What is left between two ways to compute the same in float32, in nats; updates move far more.
EQUAL, EFFECT = 1e-9, 1e-2


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseFixture]:
    names = ("llama", "llama-tied", "gpt2", "mixtral", "qwen2")
    return {name: make_base(family_row(name), tmp_path_factory.mktemp(name)) for name in names}


def loaded(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32
    ).eval()


def trained(base: BaseFixture, folder: Path, *, seed: int = 1, **settings: Any) -> Any:
    """Save an adapter, all of whose trained tensors are random; return the live model."""
    model = loaded(base.hf)
    config = peft.LoraConfig(
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
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")
        tuned = peft.get_peft_model(model, config)
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
SETTINGS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "plain": ("llama", None, {"target_modules": LINEAR}),
    "rslora-patterns": (
        "llama",
        None,
        {
            "target_modules": LINEAR,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "dora": ("llama", None, {"target_modules": LINEAR, "use_dora": True}),
    "embedding": ("llama", None, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding-dora": (
        "llama",
        None,
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ),
    "saved": ("llama", None, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved-norms": ("llama", None, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "token-rows": (
        "llama",
        None,
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 300, 7]},
    ),
    "bias": ("qwen2", None, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "trained-bias": ("qwen2", None, {"target_modules": ["q_proj"], "bias": "all"}),
    "conv1d": ("gpt2", None, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d-dora": ("gpt2", None, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "conv1d-bias": ("gpt2", None, {"target_modules": ["c_attn"], "lora_bias": True}),
    "experts": (
        "mixtral",
        None,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "tied-untied": ("llama-tied", "untie", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-output": ("llama-tied", "untie", {"target_modules": ["lm_head", "q_proj"]}),
    "tied-token-rows": (
        "llama-tied",
        "shared",
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 300, 7]},
    ),
    "tied-saved": (
        "llama-tied",
        "shared",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_peft(name: str, bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    family, tied, settings = SETTINGS[name]
    base = bases[family]
    tuned = trained(base, tmp_path / "adapter", **settings)
    report = merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged", tied=tied)
    prompts = prompts_for(base)[-8:]
    wanted = logprobs(tuned, prompts)
    assert max_kl(logprobs(base.model, prompts), wanted) > EFFECT
    merged = loaded(tmp_path / "merged")
    assert max_kl(wanted, logprobs(merged, prompts)) < EQUAL
    assert report.min_survival == pytest.approx(1, abs=1e-5)
