"""MLX adapters that are written load in mlx-lm as the model that PEFT runs, and in llama.cpp."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import mlx_oracle
import numpy as np
import pytest
import torch
import transformers
from engine import (
    engine_logprobs,
    family_row,
    logprobs,
    make_adapter,
    make_base,
    max_kl,
    prompts_for,
)
from mlx_trained import base as base  # noqa: PLC0414  (a fixture)
from mlx_trained import document, llama, tuned, without_base
from mlx_trained import quiet as quiet  # noqa: PLC0414  (a fixture)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import adapterkit
from adapterkit.base import open_base
from adapterkit.formats.mlx.losses import losses
from adapterkit.formats.peft.reader import read_peft
from adapterkit.formats.protocol import FormatOptions

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

transformers.utils.logging.disable_progress_bar()
PROMPT = torch.tensor([[3, 17, 44, 9, 60, 2]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROMPT).logits.double()


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}, 3),
    "rslora": ({"r": 4, "use_rslora": True, "target_modules": ALL}, 3),
    "ranks": ({"r": 4, "rank_pattern": {"q_proj": 2, "v_proj": 7}, "target_modules": ALL}, 3),
    "scales": ({"r": 4, "alpha_pattern": {"q_proj": 3, "v_proj": 0}, "target_modules": ALL}, 3),
    "last-blocks": ({"layers_to_transform": [1, 2], "target_modules": ["v_proj"]}, 2),
    "first-block": ({"layers_to_transform": [0], "target_modules": ["v_proj", "up_proj"]}, 3),
    "uneven": ({"target_modules": ["layers.0.mlp.up_proj", "layers.2.mlp.down_proj"]}, 3),
    "output": ({"target_modules": ["q_proj", "lm_head"]}, 3),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, 3),
    "dora": ({"r": 4, "use_dora": True, "target_modules": ALL}, 3),
    "dora-scales": (
        {"use_dora": True, "alpha_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "v_proj"]},
        3,
    ),
}


@pytest.mark.parametrize(("settings", "layers"), SETTINGS.values(), ids=SETTINGS)
def test_mlx_runs_the_model_that_peft_runs(
    settings: dict[str, Any], layers: int, base: Path, tmp_path: Path
) -> None:
    model = tuned(base, tmp_path / "peft", **settings)
    report = adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    assert report.max_relative_error < 1e-7
    plain = LlamaForCausalLM.from_pretrained(base)
    before = logits(plain)
    loaded = mlx_oracle.load(plain, tmp_path / "mlx")
    assert set(loaded.adapted) == {
        pair.module for pair in read_peft(tmp_path / "peft", FormatOptions()).pairs()
    }
    assert not loaded.idle
    assert document(tmp_path / "mlx")["num_layers"] == layers
    want = logits(model)
    assert (want - before).norm() > 1e-2
    assert (logits(plain) - want).norm() < 2e-6 * (want - before).norm()


@pytest.mark.parametrize(
    ("name", "idle"),
    [("plain", 0), ("last-blocks", 0), ("output", 0), ("dora", 0), ("first-block", 4)],
)
def test_without_a_base_the_file_is_still_right(
    name: str, idle: int, base: Path, tmp_path: Path
) -> None:
    # That block 0 is all there is to the model cannot be known; what mlx-lm adapts for nothing in
    # the blocks after it keeps b = 0.
    settings, _ = SETTINGS[name]
    model = tuned(base, tmp_path / "peft", **settings)
    without_base(tmp_path / "peft")
    adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    assert document(tmp_path / "mlx")["num_layers"] == -1
    plain = LlamaForCausalLM.from_pretrained(base)
    before = logits(plain)
    loaded = mlx_oracle.load(plain, tmp_path / "mlx")
    assert len(loaded.idle) == idle
    want = logits(model)
    assert (logits(plain) - want).norm() < 2e-6 * (want - before).norm()


@pytest.mark.parametrize("name", ["ranks", "scales", "embedding", "dora", "uneven"])
def test_peft_to_mlx_to_peft_is_the_same_model(name: str, base: Path, tmp_path: Path) -> None:
    model = tuned(base, tmp_path / "peft", **SETTINGS[name][0])
    adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    adapterkit.convert(tmp_path / "mlx", tmp_path / "back", base=base)
    plain = LlamaForCausalLM.from_pretrained(base)
    before = logits(plain)
    again = PeftModel.from_pretrained(plain, tmp_path / "back")
    want = logits(model)
    assert (logits(again) - want).norm() < 2e-6 * (want - before).norm()


def test_one_rank_and_scale_keep_every_bit(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "peft", r=4, lora_alpha=6, target_modules=ALL)
    adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    parameters = document(tmp_path / "mlx")["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (4, 1.5)
    peft = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    mlx = load_file(tmp_path / "mlx" / "adapters.safetensors")
    for name, x in peft.items():
        module, leaf = name.removeprefix("base_model.model.").split(".lora_")
        assert torch.equal(mlx[f"{module}.lora_{leaf[0].lower()}"], x.T)
    adapterkit.convert(tmp_path / "mlx", tmp_path / "back", base=base)
    assert load_file(tmp_path / "back" / "adapter_model.safetensors").keys() == peft.keys()
    for name, x in load_file(tmp_path / "back" / "adapter_model.safetensors").items():
        assert torch.equal(x, peft[name])


def test_the_scale_of_most_modules_is_kept_and_the_rest_baked_in(
    base: Path, tmp_path: Path
) -> None:
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"k_proj": 3, "o_proj": 16}}
    tuned(base, tmp_path / "peft", target_modules=ALL, **settings)
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    peft = {name: x.to(torch.bfloat16) for name, x in load_file(weights).items()}
    save_file(peft, weights)
    adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    assert document(tmp_path / "mlx")["lora_parameters"]["scale"] == 2.0
    mlx = load_file(tmp_path / "mlx" / "adapters.safetensors")
    for module, factor, dtype in (
        ("q_proj", 1.0, torch.bfloat16),
        ("o_proj", 2.0, torch.bfloat16),  # a power of two costs no bit
        ("k_proj", 0.375, torch.float32),
    ):
        path = f"model.layers.1.self_attn.{module}"
        stored = mlx[f"{path}.lora_b"]
        assert stored.dtype is dtype
        want = factor * peft[f"base_model.model.{path}.lora_B.weight"].double().T
        assert torch.equal(stored.double(), want)


def test_training_arguments_of_an_mlx_source_are_kept(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "peft", r=4, target_modules=["q_proj"])
    adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base, proof=False)
    config = document(tmp_path / "mlx") | {"iters": 600, "model": "org/name", "seed": 0}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    adapterkit.convert(tmp_path / "mlx", tmp_path / "again", to="mlx", base=base, proof=False)
    assert document(tmp_path / "again") == config
    first, second = (tmp_path / name / "adapters.safetensors" for name in ("mlx", "again"))
    assert first.read_bytes() == second.read_bytes()


def select(folder: Path, *targets: str) -> None:
    config = document(folder) | {"target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_a_tied_embedding_is_adapted_once_and_applied_twice(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tied=True)
    model = tuned(base, tmp_path / "peft", r=4, target_modules=["embed_tokens", "q_proj"])
    before = read_peft(tmp_path / "peft", FormatOptions())
    found = losses(before, FormatOptions(base=open_base(base)))
    assert [loss.code for loss in found if loss.blocks] == ["tied-embedding"]
    del model
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    table = "base_model.model.model.embed_tokens.lora_embedding_"
    stored["base_model.model.lm_head.lora_A.weight"] = stored[f"{table}B"].T.contiguous()
    stored["base_model.model.lm_head.lora_B.weight"] = stored[f"{table}A"].T.contiguous()
    save_file(stored, tmp_path / "peft" / "adapter_model.safetensors")
    select(tmp_path / "peft", "embed_tokens", "lm_head", "q_proj")
    adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    plain = LlamaForCausalLM.from_pretrained(base)
    weight = plain.model.embed_tokens.weight.detach().clone()
    loaded = mlx_oracle.load(plain, tmp_path / "mlx")
    assert "model.embed_tokens" in loaded.adapted
    assert "lm_head" not in loaded.adapted
    a, b = stored[f"{table}A"].double(), stored[f"{table}B"].double()
    torch.testing.assert_close(plain.lm_head.weight.double(), weight + 2 * (b @ a).T)


def test_two_updates_of_a_tied_table_are_lost_and_the_advice_works(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tied=True)
    model = tuned(base, tmp_path / "peft", r=4, target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(adapterkit.LossyConversionError, match="whose update is another") as refusal:
        adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    assert [loss.code for loss in refusal.value.losses] == ["tied-apart"]
    assert not (tmp_path / "mlx").exists()
    adapterkit.merge_into([tmp_path / "peft"], base, tmp_path / "merged", tied="untie")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_two_updates_of_a_tied_table_leave_where_that_is_allowed(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tied=True)
    targets = ["embed_tokens", "lm_head", "q_proj"]
    tuned(base, tmp_path / "peft", r=4, target_modules=targets, alpha_pattern={"lm_head": 3})
    how: dict[str, Any] = {"to": "mlx", "base": base, "allow_lossy": True}
    report = adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", **how)
    assert "tied-apart" in {loss.code for loss in report.losses}
    written = mlx_oracle.load(LlamaForCausalLM.from_pretrained(base), tmp_path / "mlx")
    assert {name.rpartition(".")[2] for name in written.adapted} == {"q_proj"}


def test_a_magnitude_tells_a_tied_output_from_the_embedding(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tied=True)
    targets = ["embed_tokens", "lm_head", "q_proj"]
    tuned(base, tmp_path / "peft", r=4, target_modules=targets, use_dora=True)
    found = losses(
        read_peft(tmp_path / "peft", FormatOptions()), FormatOptions(base=open_base(base))
    )
    assert {"tied-apart", "dora-embedding"} <= {loss.code for loss in found}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    folder = tmp_path_factory.mktemp("mixtral")
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def switch_layers(model: Any) -> dict[str, torch.Tensor]:
    """Return Mixtral's experts as mlx-lm holds them, as views into the model."""
    found: dict[str, torch.Tensor] = {}
    for number, block in enumerate(model.model.layers):
        gate_up = block.mlp.experts.gate_up_proj.data
        half = gate_up.shape[1] // 2
        stem = f"model.layers.{number}.block_sparse_moe.switch_mlp"
        found[f"{stem}.gate_proj"] = gate_up[:, :half]
        found[f"{stem}.up_proj"] = gate_up[:, half:]
        found[f"{stem}.down_proj"] = block.mlp.experts.down_proj.data
    return found


def test_fused_experts_become_switch_layers(mixtral: Path, tmp_path: Path) -> None:
    model = tuned(
        mixtral,
        tmp_path / "peft",
        MixtralForCausalLM,
        r=3,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    report = adapterkit.convert(
        tmp_path / "peft", tmp_path / "mlx", to="mlx", base=mixtral, unverified=True
    )
    assert report.max_relative_error < 1e-7
    plain = MixtralForCausalLM.from_pretrained(mixtral)
    before = logits(plain)
    loaded = mlx_oracle.load(plain, tmp_path / "mlx", stacks=switch_layers(plain))
    assert len(loaded.adapted) == 2 * 4
    assert not loaded.idle
    want = logits(model)
    assert (want - before).norm() > 1e-2
    assert (logits(plain) - want).norm() < 2e-6 * (want - before).norm()
    keys = document(tmp_path / "mlx")["lora_parameters"]["keys"]
    assert "block_sparse_moe.switch_mlp.gate_proj" in keys


def test_experts_one_by_one_become_switch_layers(mixtral: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    stored: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for expert in (0, 2):  # the others are not adapted
            stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}"
            for leaf, (rows, columns) in {"w1": (24, 16), "w2": (16, 24)}.items():
                stored[f"{stem}.{leaf}.lora_A.weight"] = torch.randn(
                    2, columns, generator=generator
                )
                stored[f"{stem}.{leaf}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    (tmp_path / "peft").mkdir()
    save_file(stored, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["w1", "w2"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=mixtral, unverified=True)
    plain = MixtralForCausalLM.from_pretrained(mixtral)
    before = {name: x.clone() for name, x in switch_layers(plain).items()}
    loaded = mlx_oracle.load(plain, tmp_path / "mlx", stacks=switch_layers(plain))
    assert not loaded.idle
    for name, weight in switch_layers(plain).items():
        stem, leaf = name.split("block_sparse_moe.switch_mlp.")
        single = {"gate_proj": "w1", "down_proj": "w2"}.get(leaf)
        for expert in range(4):
            path = f"base_model.model.{stem}block_sparse_moe.experts.{expert}.{single}"
            change = (weight[expert] - before[name][expert]).double()
            if f"{path}.lora_A.weight" in stored:
                a, b = stored[f"{path}.lora_A.weight"], stored[f"{path}.lora_B.weight"]
                want = 3.0 * b.double() @ a.double()
                assert (change - want).norm() < 1e-6 * want.norm(), name
            else:
                assert not change.any(), name


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen3moe"])
def test_mlx_straight_to_llama_cpp(family: str, tmp_path: Path) -> None:
    base = make_base(family_row(family), tmp_path)
    prompts = prompts_for(base)[-6:]
    tuned = make_adapter(base, tmp_path / "peft")
    want = logprobs(tuned.model, prompts)
    adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base.hf)
    for given in (base.hf, base.gguf):
        destination = tmp_path / f"{given.suffix or 'hf'}.gguf"
        report = adapterkit.convert(tmp_path / "mlx", destination, base=given)
        assert report.source_format == "mlx"
        answer = engine_logprobs(base.gguf, prompts, [(destination, 1.0)])
        assert max_kl(want, answer) < base.tolerance


def test_zero_updates_take_no_scale_from_the_others(base: Path, tmp_path: Path) -> None:
    settings = {"lora_alpha": 0, "alpha_pattern": {"v_proj": 4}}
    model = tuned(base, tmp_path / "peft", r=4, target_modules=ALL, **settings)
    adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    assert document(tmp_path / "mlx")["lora_parameters"]["scale"] == 1.0
    stored = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert not np.any(stored["model.layers.0.self_attn.q_proj.lora_b"].numpy())
    plain = LlamaForCausalLM.from_pretrained(base)
    mlx_oracle.load(plain, tmp_path / "mlx")
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-6)
