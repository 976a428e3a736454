"""A GGUF adapter becomes a PEFT adapter that transformers' own class of the base applies alike.

Mixtures of experts, state-space and hybrid models: what PEFT reaches there only through parameters,
or only under the names that current classes have.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine import (
    convert_adapter,
    family_row,
    logprobs,
    make_adapter,
    make_base,
    max_kl,
    prompts_for,
)
from peft import PeftModel

import adapterkit
from adapterkit.lowrank.differences import difference

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

ROWS = (
    "deepseek2",
    "deepseek3",
    "ernie4_5-moe",
    "gemma4-moe",
    "gpt-oss",
    "granite4",
    "granitehybrid-moe",
    "granitemoe-shared",
    "llama4",
    "mamba",
    "mixtral",
    "olmoe",
    "qwen2moe",
    "qwen35moe",
    "qwen3moe",
    "qwen3next",
)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


@pytest.mark.parametrize("name", ROWS)
def test_way_back_gives_what_peft_loads(name: str, tmp_path: Path) -> None:
    base = make_base(family_row(name), tmp_path)
    tuned = make_adapter(base, tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", base, tmp_path / "adapter.gguf", given="hf")
    report = convert_adapter(tmp_path / "adapter.gguf", base, tmp_path / "back", given="hf")
    assert report.max_relative_error < 1e-6

    first = {
        pair.module: pair for pair in adapterkit.read(tmp_path / "adapter", base=base.hf).pairs()
    }
    again = {pair.module: pair for pair in adapterkit.read(tmp_path / "back", base=base.hf).pairs()}
    assert first.keys() == again.keys()
    for module, pair in first.items():
        assert difference(pair, again[module]).relative_error < 1e-6, module

    model = type(base.model).from_pretrained(
        base.hf, attn_implementation="eager", dtype=torch.float32
    )
    # Warnings are errors here, and PEFT warns of keys that it misses or does not expect.
    loaded = PeftModel.from_pretrained(model, tmp_path / "back")
    prompts = prompts_for(base)
    assert max_kl(logprobs(tuned.model, prompts), logprobs(loaded, prompts)) < 1e-9


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_experts_of_one_layer_are_named_in_full(name: str, tmp_path: Path) -> None:
    base = make_base(family_row(name), tmp_path)
    target = "model.layers.1.mlp.experts.down_proj"
    settings = {"target_modules": ["k_proj"], "target_parameters": [target]}
    tuned = make_adapter(base, tmp_path / "adapter", **settings)
    convert_adapter(tmp_path / "adapter", base, tmp_path / "adapter.gguf")
    convert_adapter(tmp_path / "adapter.gguf", base, tmp_path / "back", given="hf")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [target]
    assert config["target_modules"] == ["k_proj"]
    model = type(base.model).from_pretrained(
        base.hf, attn_implementation="eager", dtype=torch.float32
    )
    loaded = PeftModel.from_pretrained(model, tmp_path / "back")
    prompts = prompts_for(base)
    assert max_kl(logprobs(tuned.model, prompts), logprobs(loaded, prompts)) < 1e-9
