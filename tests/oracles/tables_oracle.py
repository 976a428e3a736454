"""Tiny models with tied and untied tables, adapters of these, and what PEFT makes of both."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

if TYPE_CHECKING:
    from pathlib import Path

ROWS, GROWN, WIDTH = 64, 70, 32
TOLERANCE = 1e-5
_LAYERS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_base(
    folder: Path,
    *,
    tied: bool,
    family: str = "llama",
    dtype: Any = None,
    **how: Any,
) -> Path:
    """Write a random model and return its directory."""
    torch.manual_seed(7)
    model: Any
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=ROWS,
            n_embd=WIDTH,
            n_layer=1,
            n_head=4,
            n_positions=32,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=tied,
        )
        model = GPT2LMHeadModel(config)
    else:
        make = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
        config_class, model_class = make[family]
        model = model_class(config_class(vocab_size=ROWS, tie_word_embeddings=tied, **_LAYERS))
    model.to(dtype or torch.float32).save_pretrained(folder, **how)
    return folder


def load_model(folder: Path, dtype: Any = torch.float32) -> Any:
    """Return a saved model, ready for inference."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tuned(
    base: Path,
    folder: Path,
    *,
    rows: int = ROWS,
    dtype: Any = torch.float32,
    save_embedding_layers: bool | str = "auto",
    **settings: Any,
) -> Any:
    """Train-like an adapter of a base, resized if it has other rows; save it, return it live."""
    model = load_model(base, dtype)
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if rows != model.config.vocab_size:
            model.resize_token_embeddings(rows, mean_resizing=False)
        config = LoraConfig(
            r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **settings
        )
        live = get_peft_model(model, config).eval()
        moved(live)
        live.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return live


def reloaded(base: Path, adapter: Path) -> Any:
    """Load an adapter as PEFT's users do; a key that is missing or unexpected fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*missing adapter keys.*|.*[uU]nexpected.*")
        return PeftModel.from_pretrained(load_model(base), adapter).eval()


def moved(live: Any) -> None:
    """Give everything that PEFT trains a value that training could have given it."""
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def logits(model: Any, rows: int) -> torch.Tensor:
    """Return the logits of every token of a vocabulary, two at a time."""
    prompt = torch.arange(rows).reshape(-1, 2)
    with torch.no_grad():
        return model(input_ids=prompt).logits.float()


def assert_same(live: Any, merged: Any, rows: int, tolerance: float = TOLERANCE) -> None:
    """Compare the logits of two models over a vocabulary; more rows of the second are not read."""
    wanted, found = logits(live, rows), logits(merged, rows)[..., : logits(live, rows).shape[-1]]
    error = float((wanted - found).abs().max() / wanted.abs().max())
    assert error < tolerance, error
