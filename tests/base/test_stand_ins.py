"""Models that transformers builds with another family's class, beside their checkpoints' names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapterkit import convert, merge_into, read, validate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

CLOSE = 1e-6
RANK, ALPHA = 4, 8
SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "exaone": {},
    "sarvam_moe": {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2},
}
TARGETS = ["q_proj", "v_proj", "o_proj"]
OWN = {"model.layers": "transformer.h", "self_attn.o_proj": "attn.attention.out_proj"}


def made(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write a base and an adapter, and return what PEFT merges them to."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False
    )
    live = peft.get_peft_model(model, lora)
    live.save_pretrained(folder / "adapter")
    return live.merge_and_unload().state_dict()


def assert_merged(adapter: Path, folder: Path, expected: dict[str, torch.Tensor]) -> None:
    merge_into([adapter], folder / "base", folder / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[key], expected[key], atol=CLOSE) for key in expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_names_of_the_stand_in_reach_the_checkpoint(kind: str, tmp_path: Path) -> None:
    assert_merged(tmp_path / "adapter", tmp_path, made(kind, tmp_path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_all_that_the_stand_in_has_is_applied_by_peft(kind: str, tmp_path: Path) -> None:
    made(kind, tmp_path)
    base, adapter = tmp_path / "base", tmp_path / "all"
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if MODELS[kind] else None
    lora = peft.LoraConfig(
        r=RANK,
        target_modules=[*TARGETS, "embed_tokens", "up_proj", "lm_head"],
        target_parameters=experts,
        init_lora_weights=False,
    )
    peft.get_peft_model(model, lora).save_pretrained(adapter)
    found = validate(adapter, base=base, targets=["peft"]).targets[0]
    assert found.verdict == "applied", found.coverage
    assert len(found.coverage["applied"]) == len(read(adapter).modules)


@pytest.mark.filterwarnings("ignore")
def test_names_of_the_remote_code_reach_it_too(tmp_path: Path) -> None:
    expected = made("exaone", tmp_path)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = key
        for new, old in (*OWN.items(), ("self_attn", "attn.attention")):
            name = name.replace(new, old)
        renamed[name] = tensor
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, tmp_path / "adapter" / "adapter_model.safetensors")
    config = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"target_modules": ["q_proj", "v_proj", "out_proj"]}
    config.write_text(json.dumps(fields))
    assert_merged(tmp_path / "adapter", tmp_path, expected)


@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_tensor_that_llama_cpp_has_whole_are_written_as_one(tmp_path: Path) -> None:
    made("sarvam_moe", tmp_path)
    convert(tmp_path / "adapter", tmp_path / "a.gguf", base=tmp_path / "base")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    assert not [name for name in found if ".attn_q." in name or ".attn_v." in name]
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1.self_attn"
    q, v = (
        factors[f"{layer}.{part}.lora_B.weight"] @ factors[f"{layer}.{part}.lora_A.weight"]
        for part in ("q_proj", "v_proj")
    )
    keys = torch.zeros(len(v), q.shape[1])
    a, b = (torch.from_numpy(found[f"blk.1.attn_qkv.weight.lora_{each}"]) for each in "ab")
    # llama.cpp divides alpha by the rank that it sees.
    scale = reader.fields["adapter.lora.alpha"].contents() / len(a)
    assert torch.allclose(b @ a * scale, torch.cat((q, keys, v)) * ALPHA / RANK, atol=1e-5)
