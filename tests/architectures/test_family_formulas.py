"""Stored factors make the update that llama.cpp's layout of the full weights would show.

For families that no class of transformers has, or that llama.cpp cannot run: every formula is
written down here once more, on full weights, with no use of the tables' transforms.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from converter_formulas import CASES as RECORDED
from expert_formulas import CASES
from safetensors.numpy import save_file

from adapterkit.architectures import families, load
from adapterkit.base import open_base
from adapterkit.conversion import convert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]

pytestmark = pytest.mark.slow

Expected = dict[str, "Array"]
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN = 8, 2, 8, 64, 96


def interleave_halves(weight: Array, heads: int) -> Array:
    """Turn a head's rows x_0 x_1 .. y_0 y_1 .. into x_0 y_0 x_1 y_1 .."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def by_group(weight: Array, groups: int) -> tuple[Array, Array, Array]:
    """Take apart (group, queries then key then value, row)."""
    grid = weight.reshape(groups, -1, HEAD_DIM, weight.shape[-1])
    return tuple(  # pyright: ignore[reportReturnType]
        np.concatenate([group[part] for group in grid]).reshape(-1, weight.shape[-1])
        for part in (slice(0, -2), slice(-2, -1), slice(-1, None))
    )


def internlm2_qkv(weight: Array) -> Expected:
    q, k, v = by_group(weight, KV_HEADS)
    q, k = interleave_halves(q, HEADS), interleave_halves(k, KV_HEADS)
    return {"blk.1.attn_q": q, "blk.1.attn_k": k, "blk.1.attn_v": v}


def baichuan_qkv(weight: Array) -> Expected:
    q, k, v = weight[:HIDDEN], weight[HIDDEN : 2 * HIDDEN], weight[2 * HIDDEN :]
    q, k = interleave_halves(q, HEADS), interleave_halves(k, HEADS)
    return {"blk.1.attn_q": q, "blk.1.attn_k": k, "blk.1.attn_v": v}


def falcon_qkv(weight: Array) -> Expected:
    return {"blk.1.attn_qkv": np.concatenate(by_group(weight, HEADS))}


def ernie_qkv(weight: Array) -> Expected:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {
        "blk.1.attn_q": weight[:q],
        "blk.1.attn_k": weight[q : q + kv],
        "blk.1.attn_v": weight[q + kv :],
    }


def ernie_gate_up(weight: Array) -> Expected:
    return {"blk.1.ffn_gate": weight[:FFN], "blk.1.ffn_up": weight[FFN:]}


def same(tensor: str) -> Callable[[Array], Expected]:
    return lambda weight: {tensor: weight}


COMMON = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "vocab_size": 512}
LLAMA_LIKE = {**COMMON, "num_key_value_heads": KV_HEADS, "intermediate_size": FFN}
GROUPED = (HEADS + 2 * KV_HEADS) * HEAD_DIM
Module = tuple[int, int, "Callable[[Array], Expected]"]
# Class and config of a base; module -> its rows and columns, and the tensors it fills.
DENSE: dict[str, tuple[str, dict[str, Any], dict[str, Module]]] = {
    "internlm2": (
        "InternLM2ForCausalLM",
        LLAMA_LIKE,
        {
            "model.layers.1.attention.wqkv": (GROUPED, HIDDEN, internlm2_qkv),
            "model.layers.1.attention.wo": (HIDDEN, HIDDEN, same("blk.1.attn_output")),
            "model.layers.1.feed_forward.w1": (FFN, HIDDEN, same("blk.1.ffn_gate")),
            "model.layers.1.feed_forward.w2": (HIDDEN, FFN, same("blk.1.ffn_down")),
            "model.layers.1.feed_forward.w3": (FFN, HIDDEN, same("blk.1.ffn_up")),
            "output": (512, HIDDEN, same("output")),
        },
    ),
    "baichuan": (
        "BaichuanForCausalLM",
        {**COMMON, "intermediate_size": FFN},
        {
            "model.layers.1.self_attn.W_pack": (3 * HIDDEN, HIDDEN, baichuan_qkv),
            "model.layers.1.self_attn.o_proj": (HIDDEN, HIDDEN, same("blk.1.attn_output")),
            "model.layers.1.mlp.gate_proj": (FFN, HIDDEN, same("blk.1.ffn_gate")),
            "model.layers.1.mlp.up_proj": (FFN, HIDDEN, same("blk.1.ffn_up")),
            "model.layers.1.mlp.down_proj": (HIDDEN, FFN, same("blk.1.ffn_down")),
        },
    ),
    "chatglm": (
        "ChatGLMModel",
        {
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "multi_query_attention": True,
            "multi_query_group_num": KV_HEADS,
            "kv_channels": HEAD_DIM,
            "ffn_hidden_size": FFN,
            "padded_vocab_size": 512,
        },
        {
            f"transformer.encoder.layers.1.{module}": case
            for module, case in {
                "self_attention.query_key_value": (GROUPED, HIDDEN, same("blk.1.attn_qkv")),
                "self_attention.dense": (HIDDEN, HIDDEN, same("blk.1.attn_output")),
                "mlp.dense_h_to_4h": (2 * FFN, HIDDEN, same("blk.1.ffn_up")),
                "mlp.dense_4h_to_h": (HIDDEN, FFN, same("blk.1.ffn_down")),
            }.items()
        },
    ),
    "qwen": (
        "QWenLMHeadModel",
        {**COMMON, "intermediate_size": 2 * FFN},
        {
            f"transformer.h.1.{module}": case
            for module, case in {
                "attn.c_attn": (3 * HIDDEN, HIDDEN, same("blk.1.attn_qkv")),
                "attn.c_proj": (HIDDEN, HIDDEN, same("blk.1.attn_output")),
                "mlp.w1": (FFN, HIDDEN, same("blk.1.ffn_up")),
                "mlp.w2": (FFN, HIDDEN, same("blk.1.ffn_gate")),
                "mlp.c_proj": (HIDDEN, FFN, same("blk.1.ffn_down")),
            }.items()
        },
    ),
    "falcon_rw": (
        "FalconForCausalLM",
        {
            **COMMON,
            "alibi": True,
            "multi_query": False,
            "new_decoder_architecture": False,
            "num_kv_heads": HEADS,
        },
        {
            f"transformer.h.1.{module}": case
            for module, case in {
                "self_attention.query_key_value": (3 * HIDDEN, HIDDEN, falcon_qkv),
                "self_attention.dense": (HIDDEN, HIDDEN, same("blk.1.attn_output")),
                "mlp.dense_h_to_4h": (4 * HIDDEN, HIDDEN, same("blk.1.ffn_up")),
                "mlp.dense_4h_to_h": (HIDDEN, 4 * HIDDEN, same("blk.1.ffn_down")),
            }.items()
        },
    ),
    "ernie4_5": (
        "Ernie4_5_ForCausalLM",
        LLAMA_LIKE,
        {
            "model.layers.1.self_attn.qkv_proj": (GROUPED, HIDDEN, ernie_qkv),
            "model.layers.1.mlp.up_gate_proj": (2 * FFN, HIDDEN, ernie_gate_up),
        },
    ),
}


DENSE |= CASES | RECORDED


def write_adapter(folder: Path, modules: Mapping[str, Module]) -> dict[str, Array]:
    """Save a random PEFT adapter and return the dense update of every module."""
    random = np.random.default_rng(0)
    tensors: dict[str, Array] = {}
    updates: dict[str, Array] = {}
    for module, (out, columns, _) in modules.items():
        a = random.normal(size=(4, columns)).astype(np.float32)
        b = random.normal(size=(out, 4)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        updates[module] = 2.5 * (b.astype(float) @ a.astype(float))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [re.escape(module) for module in modules]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "target_modules": "|".join(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return updates


def stored_updates(path: Path) -> dict[str, Array]:
    """Multiply the factors of a GGUF adapter, read by llama.cpp's own Python package."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    stored = {tensor.name: np.array(tensor.data, dtype=float) for tensor in reader.tensors}
    names = {name.removesuffix(".weight.lora_a") for name in stored if name.endswith("_a")}
    return {
        name: alpha
        / stored[f"{name}.weight.lora_b"].shape[-1]
        * stored[f"{name}.weight.lora_b"]
        @ stored[f"{name}.weight.lora_a"]
        for name in names
    }


@pytest.mark.parametrize("name", DENSE)
def test_stored_factors_make_the_update_of_full_weights(name: str, tmp_path: Path) -> None:
    model_class, config, modules = DENSE[name]
    base = {"architectures": [model_class], "num_hidden_layers": 2, **config}
    (tmp_path / "config.json").write_text(json.dumps(base))
    assert open_base(tmp_path / "config.json").architecture.name == name
    updates = write_adapter(tmp_path / "adapter", modules)
    convert(tmp_path / "adapter", tmp_path / "a.gguf", base=tmp_path / "config.json")
    expected: Expected = {}
    for module, (_, _, formula) in modules.items():
        for tensor, weight in formula(updates[module]).items():
            expected[tensor] = expected.get(tensor, 0) + weight
    stored = stored_updates(tmp_path / "a.gguf")
    assert stored.keys() == expected.keys()
    for tensor, weight in expected.items():
        np.testing.assert_allclose(stored[tensor], weight, rtol=1e-6, atol=1e-6, err_msg=tensor)

    convert(tmp_path / "a.gguf", tmp_path / "back", base=tmp_path / "config.json")
    again = convert(tmp_path / "back", tmp_path / "b.gguf", base=tmp_path / "config.json")
    assert again.max_relative_error == 0
    for tensor, weight in stored_updates(tmp_path / "b.gguf").items():
        np.testing.assert_allclose(weight, expected[tensor], rtol=1e-6, atol=1e-6, err_msg=tensor)


def test_families_said_to_be_proven_dense_are_proven_here() -> None:
    said = {name for name in families() if load(name).verified == "dense"}
    assert said <= DENSE.keys()
