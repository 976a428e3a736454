"""A base and adapters with settings that promise tensors."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_llama import saved_llama
from transformers import LlamaForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

PROMPT = torch.tensor([[3, 17, 44, 9, 60, 2]])


TARGETS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(
        tmp_path_factory.mktemp("base") / "model",
        seed=3,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
    )


def trained(base: Path, folder: Path, **settings: Any) -> Path:
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's own use of transformers, and of biases on B
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


def logits(base: Path, adapter: Path) -> np.ndarray[Any, Any]:
    model = LlamaForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that are missing
        tuned = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return tuned(PROMPT).logits.numpy()
