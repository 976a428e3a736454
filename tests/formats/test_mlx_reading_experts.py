"""Stacks of experts in MLX adapters, in every spelling that MLX-LM has had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dense_updates import dense
from mlx_files import (
    FIXTURES,
    IN,
    OUT,
    E,
    R,
    change,
    drawn,
    hf,
    linear,
    read,
    same,
    saved,
    stack,
)
from transformers import Qwen3MoeConfig

from adapterkit.base import open_base


def test_experts_one_by_one(tmp_path: Path) -> None:
    block = "model.layers.1.mlp.switch_mlp"
    tensors = stack(block)
    found = dense(read(saved(tmp_path, tensors), moe_layout="experts"))
    assert len(found) == 3 * E
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(E):
            name = f"model.layers.1.mlp.experts.{expert}.{leaf}"
            want = change(tensors, f"{block}.{leaf}")[expert]
            same(found[name], want)


def test_experts_fused_as_transformers_5_holds_them(tmp_path: Path) -> None:
    block = "model.layers.1.mlp.switch_mlp"
    tensors = stack(block)
    found = dense(read(saved(tmp_path, tensors)))
    gate, up = (change(tensors, f"{block}.{leaf}") for leaf in ("gate_proj", "up_proj"))
    want = np.concatenate([gate, up], axis=1)
    experts = "model.layers.1.mlp.experts"
    same(found[f"{experts}.gate_up_proj"], want)
    down = change(tensors, f"{block}.down_proj")
    same(found[f"{experts}.down_proj"], down)
    assert found.keys() == {f"{experts}.gate_up_proj", f"{experts}.down_proj"}


def test_mixtral_calls_its_experts_otherwise(tmp_path: Path) -> None:
    block = "model.layers.0.block_sparse_moe"
    router = {f"{block}.gate.lora_a": drawn(IN, R), f"{block}.gate.lora_b": drawn(R, E)}
    tensors = {**stack(f"{block}.switch_mlp"), **router}
    path = saved(tmp_path, tensors)
    single = dense(read(path, moe_layout="experts"))
    for leaf, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        want = change(tensors, f"{block}.switch_mlp.{leaf}")[2]
        same(single[f"{block}.experts.2.{name}"], want)
    assert f"{block}.gate" in single
    fused = dense(read(path))
    assert fused.keys() == {
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }


def test_the_base_says_how_experts_are_spelled(tmp_path: Path) -> None:
    path = saved(tmp_path / "mlx", stack("model.layers.0.mlp.switch_mlp"))
    old = Qwen3MoeConfig(num_experts=E)
    base = hf(tmp_path / "new", old)
    assert "model.layers.0.mlp.experts.down_proj" in read(path, base=base).modules
    document = json.loads((tmp_path / "new" / "config.json").read_text())
    document["transformers_version"] = "4.57.1"
    (tmp_path / "old.json").write_text(json.dumps(document))
    modules = read(path, base=open_base(tmp_path / "old.json")).modules
    assert "model.layers.0.mlp.experts.0.down_proj" in modules


def test_experts_of_older_files_are_unflattened_expert_by_expert(tmp_path: Path) -> None:
    tensors = stack("model.layers.0.mlp.switch_mlp")
    flat = {
        name: x.reshape(-1, x.shape[-1]) if name.endswith("lora_a") else x
        for name, x in tensors.items()
    }
    new, old = read(saved(tmp_path / "new", tensors)), read(saved(tmp_path / "old", flat))
    for module, update in dense(old).items():
        same(update, dense(new)[module])
    assert any("0.28.3" in note for note in old.provenance.notes)
    assert not new.provenance.notes


def test_stacks_of_unknown_names_stay_as_they_are(tmp_path: Path) -> None:
    module = "model.layers.0.feed_forward.experts.gate_proj"
    tensors = {f"{module}.lora_a": drawn(E, R, IN), f"{module}.lora_b": drawn(E, OUT, R)}
    assert dense(read(saved(tmp_path, tensors)))[module].shape == (E, OUT, IN)


NAMES = {
    "model.h.0.attn.c_attn": "transformer.h.0.attn.c_attn",
    "model.h.3.attention.query_key_value": "gpt_neox.layers.3.attention.query_key_value",
    "language_model.model.layers.0.self_attn.q_proj": (
        "model.language_model.layers.0.self_attn.q_proj"
    ),
    "model.layers.0.mlp.gate_up_proj": "model.layers.0.mlp.gate_up_proj",
}


@pytest.mark.parametrize(("mlx", "name"), NAMES.items(), ids=NAMES)
def test_modules_get_the_names_of_transformers(mlx: str, name: str, tmp_path: Path) -> None:
    assert read(saved(tmp_path, linear(mlx))).modules == (name,)


def test_both_layouts_of_experts_hold_the_same_update() -> None:
    new, old = (read(FIXTURES / "mlx" / name) for name in ("experts", "experts-flat"))
    assert dense(new).keys() == dense(old).keys()
    for module, update in dense(new).items():
        assert update.any()
        same(update, dense(old)[module])
