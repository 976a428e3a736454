"""An adapter made for a base validates on it; on a base changed in one place it does not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit import AdapterTensorSet, LazyTensor, Role, Severity, TensorKey
from adapterkit.base import open_base
from adapterkit.base.places import Places
from adapterkit.checks.adapter import check

if TYPE_CHECKING:
    from adapterkit.base import BaseModel

pytestmark = pytest.mark.slow

EXAMPLES = 60
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    family = draw(st.sampled_from(sorted(CLASSES)))
    heads = draw(st.sampled_from([2, 4, 8]))
    return {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2])),
        "head_dim": draw(st.sampled_from([4, 6, 8])),
        "hidden_size": draw(st.sampled_from([16, 24, 40])),
        "intermediate_size": draw(st.sampled_from([20, 28, 44])),
        "vocab_size": draw(st.sampled_from([32, 50])),
        "num_local_experts": 3,
        "tie_word_embeddings": False,
    }


def opened(config: dict[str, Any]) -> BaseModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        return open_base(path)


def made_for(base: BaseModel, seed: int) -> AdapterTensorSet:
    """Return an adapter of every linear layer and of the embedding."""
    random = np.random.default_rng(seed)

    def factor(*shape: int) -> LazyTensor:
        return LazyTensor.of(random.standard_normal(shape, np.float32))

    weights = Places(base)
    tensors: dict[TensorKey, LazyTensor] = {}
    for module in weights.modules():
        shape = weights.shape(module)
        assert shape is not None
        rows, columns = shape
        if module.endswith("embed_tokens"):
            tensors[TensorKey(module, Role.EMBEDDING_A)] = factor(2, rows)
            tensors[TensorKey(module, Role.EMBEDDING_B)] = factor(columns, 2)
        else:
            tensors[TensorKey(module, Role.LORA_A)] = factor(2, columns)
            tensors[TensorKey(module, Role.LORA_B)] = factor(rows, 2)
    return AdapterTensorSet(tensors=tensors, scales={key.module: 2.0 for key in tensors})


def worst(adapter: AdapterTensorSet, base: BaseModel) -> set[Severity]:
    return {finding.severity for finding in check(adapter, base)}


@settings(max_examples=EXAMPLES)
@given(config=configs(), seed=st.integers(0, 99))
def test_adapter_made_for_a_base_validates_on_it(config: dict[str, Any], seed: int) -> None:
    base = opened(config)
    assert check(made_for(base, seed), base) == []


MUTATIONS = (
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "num_hidden_layers",
    "num_local_experts",
)


@settings(max_examples=EXAMPLES)
@given(config=configs(), name=st.sampled_from(MUTATIONS), smaller=st.booleans())
def test_one_changed_size_is_caught(config: dict[str, Any], name: str, *, smaller: bool) -> None:
    base = opened(config)
    fewer = name in {"num_hidden_layers", "num_local_experts"}
    if name == "num_local_experts" and config["model_type"] != "mixtral":
        return
    # What the base has more of than the adapter needs does no harm to what is adapted.
    value = config[name] - 1 if fewer else config[name] * 2 if not smaller else config[name] - 1
    if not value:
        return
    changed = opened(config | {name: value})
    assert Severity.ERROR in worst(made_for(base, 0), changed)


@settings(max_examples=EXAMPLES)
@given(config=configs(), other=st.sampled_from(["gpt2", "gpt_neox", "phi3", "bloom", "mixtral"]))
def test_another_architecture_is_caught(config: dict[str, Any], other: str) -> None:
    if other == config["model_type"]:
        return
    classes = {
        "gpt2": "GPT2LMHeadModel",
        "gpt_neox": "GPTNeoXForCausalLM",
        "bloom": "BloomForCausalLM",
    }
    base, adapter = opened(config), made_for(opened(config), 0)
    name = classes.get(other) or CLASSES[other]
    changed = opened(config | {"model_type": other, "architectures": [name]})
    assert changed.architecture is not base.architecture
    assert Severity.ERROR in worst(adapter, changed)
