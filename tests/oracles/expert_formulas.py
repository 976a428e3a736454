"""Formulas on full weights for experts, latent attention, encoders and T5.

See test_family_formulas, which uses them. A formula gives the tensors that a module fills. Experts
of one tensor add up: each gives a stack in which the others are zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = np.ndarray[Any, np.dtype[Any]]
    Formula = Callable[[Array], dict[str, Array]]
    Module = tuple[int, int, Formula]

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN = 8, 2, 8, 64, 96
EXPERTS, EXPERT_FFN = 3, 40
NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 6, 4, 10, 24, 12


def same(tensor: str) -> Formula:
    return lambda weight: {tensor: weight}


def halves_in_turn(tensor: str, heads: int) -> Formula:
    """Row 2j of a head is its row j, row 2j + 1 its row j + HEAD_DIM / 2."""

    def formula(weight: Array) -> dict[str, Array]:
        turned = np.empty_like(weight)
        for head in range(heads):
            for j in range(HEAD_DIM // 2):
                turned[head * HEAD_DIM + 2 * j] = weight[head * HEAD_DIM + j]
                turned[head * HEAD_DIM + 2 * j + 1] = weight[head * HEAD_DIM + j + HEAD_DIM // 2]
        return {tensor: turned}

    return formula


def expert(tensor: str, number: int) -> Formula:
    def formula(weight: Array) -> dict[str, Array]:
        stack = np.zeros((EXPERTS, *weight.shape))
        stack[number] = weight
        return {tensor: stack}

    return formula


def latent(weight: Array) -> dict[str, Array]:
    """Every head's key rows, turned, and its value rows."""
    keys, values = [], []
    for head in range(HEADS):
        start = head * (NOPE + VALUE)
        keys.append(weight[start : start + NOPE].T)
        values.append(weight[start + NOPE : start + NOPE + VALUE])
    return {"blk.1.attn_k_b": np.stack(keys), "blk.1.attn_v_b": np.stack(values)}


def under(prefix: str, modules: dict[str, Module]) -> dict[str, Module]:
    return {f"{prefix}{name}": module for name, module in modules.items()}


ATTENTION: dict[str, Module] = {
    "self_attn.q_proj": (HIDDEN, HIDDEN, same("blk.1.attn_q")),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN, same("blk.1.attn_k")),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN, same("blk.1.attn_v")),
    "self_attn.o_proj": (HIDDEN, HIDDEN, same("blk.1.attn_output")),
}
ROTATED: dict[str, Module] = {
    **ATTENTION,
    "self_attn.q_proj": (HIDDEN, HIDDEN, halves_in_turn("blk.1.attn_q", HEADS)),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN, halves_in_turn("blk.1.attn_k", KV_HEADS)),
}


def experts(module: str, names: tuple[str, str, str], width: int) -> dict[str, Module]:
    """Return gate, up and down of the first and the last expert; those between are missing."""
    gate, up, down = names
    found: dict[str, Module] = {}
    for number in (0, EXPERTS - 1):
        stem = f"{module}.{number}."
        found[stem + gate] = (width, HIDDEN, expert("blk.1.ffn_gate_exps", number))
        found[stem + up] = (width, HIDDEN, expert("blk.1.ffn_up_exps", number))
        found[stem + down] = (HIDDEN, width, expert("blk.1.ffn_down_exps", number))
    return found


DEEPSEEK_MLP: dict[str, Module] = {
    "mlp.gate": (EXPERTS, HIDDEN, same("blk.1.ffn_gate_inp")),
    "mlp.shared_experts.gate_proj": (2 * EXPERT_FFN, HIDDEN, same("blk.1.ffn_gate_shexp")),
    "mlp.shared_experts.up_proj": (2 * EXPERT_FFN, HIDDEN, same("blk.1.ffn_up_shexp")),
    "mlp.shared_experts.down_proj": (HIDDEN, 2 * EXPERT_FFN, same("blk.1.ffn_down_shexp")),
    **experts("mlp.experts", ("gate_proj", "up_proj", "down_proj"), EXPERT_FFN),
}
LATENT: dict[str, Module] = {
    "self_attn.q_a_proj": (Q_RANK, HIDDEN, same("blk.1.attn_q_a")),
    "self_attn.q_b_proj": (HEADS * (NOPE + ROPE), Q_RANK, same("blk.1.attn_q_b")),
    "self_attn.kv_a_proj_with_mqa": (KV_RANK + ROPE, HIDDEN, same("blk.1.attn_kv_a_mqa")),
    "self_attn.kv_b_proj": (HEADS * (NOPE + VALUE), KV_RANK, latent),
    "self_attn.o_proj": (HIDDEN, HEADS * VALUE, same("blk.1.attn_output")),
}
BERT: dict[str, Module] = {
    "attention.self.query": (HIDDEN, HIDDEN, same("blk.1.attn_q")),
    "attention.self.key": (HIDDEN, HIDDEN, same("blk.1.attn_k")),
    "attention.self.value": (HIDDEN, HIDDEN, same("blk.1.attn_v")),
    "attention.output.dense": (HIDDEN, HIDDEN, same("blk.1.attn_output")),
    "intermediate.dense": (FFN, HIDDEN, same("blk.1.ffn_up")),
    "output.dense": (HIDDEN, FFN, same("blk.1.ffn_down")),
}


def t5_attention(side: str, place: int, module: str, tensor: str) -> dict[str, Module]:
    stem, short = f"{side}.block.1.layer.{place}.{module}.", f"{side[:3]}.blk.1.{tensor}"
    inner = HEADS * HEAD_DIM // 2
    inward: dict[str, Module] = {
        stem + name: (inner, HIDDEN, same(f"{short}_{name}")) for name in "qkv"
    }
    return {**inward, stem + "o": (HIDDEN, inner, same(f"{short}_o"))}


def t5_feed_forward(side: str, place: int, inward: dict[str, str]) -> dict[str, Module]:
    stem, short = f"{side}.block.1.layer.{place}.DenseReluDense.", f"{side[:3]}.blk.1."
    found: dict[str, Module] = {
        stem + name: (FFN, HIDDEN, same(short + tensor)) for name, tensor in inward.items()
    }
    return {**found, stem + "wo": (HIDDEN, FFN, same(short + "ffn_down"))}


T5_ATTENTION = {
    **t5_attention("encoder", 0, "SelfAttention", "attn"),
    **t5_attention("decoder", 0, "SelfAttention", "attn"),
    **t5_attention("decoder", 1, "EncDecAttention", "cross_attn"),
}
GATED = {"wi_0": "ffn_gate", "wi_1": "ffn_up"}
PLAIN = {"wi": "ffn_up"}
COMMON = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "vocab_size": 512}
T5_SIZES = {"d_model": HIDDEN, "d_kv": HEAD_DIM // 2, "d_ff": FFN, "num_heads": HEADS}
MIXTURE = {
    **COMMON,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FFN,
    "moe_intermediate_size": EXPERT_FFN,
    "n_shared_experts": 2,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "transformers_version": "4.57.0",
}
LAYER = "model.layers.1."
# Family -> class and config of a base; module -> its rows and columns, and the tensors it fills.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Module]]] = {
    "deepseek": ("DeepseekForCausalLM", MIXTURE, under(LAYER, {**ROTATED, **DEEPSEEK_MLP})),
    "deepseek2": (
        "DeepseekV3ForCausalLM",
        {
            **MIXTURE,
            "q_lora_rank": Q_RANK,
            "kv_lora_rank": KV_RANK,
            "qk_nope_head_dim": NOPE,
            "qk_rope_head_dim": ROPE,
            "v_head_dim": VALUE,
        },
        under(LAYER, {**LATENT, **DEEPSEEK_MLP}),
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        MIXTURE,
        under(
            LAYER,
            {
                **ATTENTION,
                "block_sparse_moe.gate": (EXPERTS, HIDDEN, same("blk.1.ffn_gate_inp")),
                **experts("block_sparse_moe.experts", ("w1", "w3", "w2"), FFN),
            },
        ),
    ),
    "bert": (
        "BertForSequenceClassification",
        {**COMMON, "intermediate_size": FFN},
        under("bert.encoder.layer.1.", BERT),
    ),
    "nomic-bert": (
        "NomicBertModel",
        {"n_embd": HIDDEN, "n_head": HEADS, "n_inner": FFN, "vocab_size": 512},
        under(
            "encoder.layers.1.",
            {
                "attn.Wqkv": (3 * HIDDEN, HIDDEN, same("blk.1.attn_qkv")),
                "attn.out_proj": (HIDDEN, HIDDEN, same("blk.1.attn_output")),
                "mlp.fc11": (FFN, HIDDEN, same("blk.1.ffn_up")),
                "mlp.fc12": (FFN, HIDDEN, same("blk.1.ffn_gate")),
                "mlp.fc2": (HIDDEN, FFN, same("blk.1.ffn_down")),
            },
        ),
    ),
    "modern-bert": (
        "ModernBertForMaskedLM",
        {**COMMON, "intermediate_size": FFN},
        under(
            LAYER,
            {
                "attn.Wqkv": (3 * HIDDEN, HIDDEN, same("blk.1.attn_qkv")),
                "attn.Wo": (HIDDEN, HIDDEN, same("blk.1.attn_output")),
                "mlp.Wi": (2 * FFN, HIDDEN, same("blk.1.ffn_up")),
                "mlp.Wo": (HIDDEN, FFN, same("blk.1.ffn_down")),
            },
        ),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            **T5_SIZES,
            "vocab_size": 512,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        {
            **T5_ATTENTION,
            **t5_feed_forward("encoder", 1, GATED),
            **t5_feed_forward("decoder", 2, GATED),
            "lm_head": (512, HIDDEN, same("output")),
        },
    ),
    "t5-relu": (
        "T5ForConditionalGeneration",
        {**T5_SIZES, "vocab_size": 512, "feed_forward_proj": "relu"},
        {
            **T5_ATTENTION,
            **t5_feed_forward("encoder", 1, PLAIN),
            **t5_feed_forward("decoder", 2, PLAIN),
        },
    ),
}
