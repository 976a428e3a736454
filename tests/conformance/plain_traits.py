"""The recipes of traits that settings of PEFT alone make."""

from __future__ import annotations

import torch

from conformance.making import (
    RECIPES,
    Document,
    Tensors,
    plainly,
    settings,
    without,
)

EMBED = ["embed_tokens", "q_proj"]

__all__ = ["RECIPES"]

plainly("plain")
plainly("rslora", settings(use_rslora=False), use_rslora=True)
plainly("alpha-pattern", settings(alpha_pattern={}), alpha_pattern={"q_proj": 3, "down_proj": 20})
plainly("alpha-zero", settings(lora_alpha=8), lora_alpha=0)
plainly("dora", without("magnitude", use_dora=False), use_dora=True)
plainly(
    "lora-bias",
    without("lora_B.bias", lora_bias=False),
    lora_bias=True,
    target_modules=["q_proj", "v_proj"],
)
plainly("saved-biases", without(".bias", bias="none"), bias="all")
plainly(
    "saved-biases-of-targets",
    without(".bias", bias="none"),
    bias="lora_only",
    target_modules=["q_proj", "v_proj"],
)
plainly(
    "modules-to-save",
    without("lm_head", "norm", modules_to_save=None),
    modules_to_save=["lm_head", "norm"],
)
plainly(
    "token-rows",
    without("token_adapter", "trainable_tokens", trainable_token_indices=None),
    trainable_token_indices=[5, 300, 7],
)
plainly(
    "token-rows-tied",
    without("token_adapter", "trainable_tokens", trainable_token_indices=None),
    trainable_token_indices=[5, 300, 7],
)
plainly("embedding", without("embed_tokens", target_modules=["q_proj"]), target_modules=EMBED)
plainly("embedding-tied", without("embed_tokens", target_modules=["q_proj"]), target_modules=EMBED)
plainly("embedding-copies", without("base_layer", "lm_head"), target_modules=EMBED, embeddings=True)
plainly(
    "output", without("lm_head", target_modules=["q_proj"]), target_modules=["lm_head", "q_proj"]
)
plainly(
    "output-tied",
    without("lm_head", target_modules=["q_proj"]),
    target_modules=["lm_head", "q_proj"],
)
plainly("pissa", settings(init_lora_weights=True), init_lora_weights="pissa")
plainly("olora", settings(init_lora_weights=True), init_lora_weights="olora")
plainly("fan-in-fan-out", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
plainly(
    "experts-fused",
    target_modules=["q_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)
plainly(
    "tied-both",
    without("lm_head", "embed_tokens", target_modules=["q_proj"], ensure_weight_tying=False),
    target_modules=EMBED,
    ensure_weight_tying=True,
)


def _one_rank(config: Document, tensors: Tensors) -> None:
    """Give q_proj the rank of the others; its new rows and columns are random."""
    config["rank_pattern"] = {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        axis = 0 if "lora_A" in name else 1
        if tensor.shape[axis] == 2:
            shape = [4 if place == axis else size for place, size in enumerate(tensor.shape)]
            tensors[name] = 0.1 * torch.randn(shape, generator=generator)


plainly("rank-pattern", _one_rank, rank_pattern={"q_proj": 2})
