"""PEFT's own TINYLORA tuner as the oracle: its updates and its logits, read and written."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from engine.bases import random_model
from engine.rows import family_row
from peft import PeftModel, TinyLoraConfig, get_peft_model
from peft.tuners.tinylora.layer import TinyLoraLayer
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from adapterkit.architectures import load
from adapterkit.conversion import convert
from adapterkit.errors import BaseRequiredError, FormatError, LossyConversionError, UnsupportedError
from adapterkit.formats.peft.tinylora_reader import read_peft_tinylora
from adapterkit.formats.protocol import FormatOptions
from adapterkit.registry import detect
from adapterkit.tinylora.adapter import carried
from adapterkit.tinylora.registration import known_families, registered

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.model import AdapterTensorSet

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXACT = 1e-6
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def tuned(model: Any, **settings: Any) -> Any:
    usual = {"r": 2, "u": 3, "init_weights": "uniform", "init_v_bound": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = TinyLoraConfig(**{"target_modules": LINEAR, **usual, **settings})
        return get_peft_model(model, config).eval()


def saved(model: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False, **options)
    return folder


def loaded(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder).eval()


def true_deltas(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return each module's update as PEFT computes it, in (out, in), embeddings as stored."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, TinyLoraLayer):
            delta = module.get_delta_weight("default").detach().to(torch.float64).numpy()
            found[name] = delta.T if getattr(module, "fan_in_fan_out", False) else delta
    return found


def deltas(adapter: AdapterTensorSet) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}
    for pair in adapter.pairs():
        dense = pair.scale * (pair.b.numpy().astype(float) @ pair.a.numpy().astype(float))
        found[pair.module] = dense.T if pair.embedding else dense
    return found


def assert_equal(
    adapter: AdapterTensorSet, truth: dict[str, np.ndarray[Any, Any]], bound: float = EXACT
) -> None:
    mine = deltas(adapter)
    assert mine.keys() == truth.keys()
    for name, delta in truth.items():
        norm = np.linalg.norm(delta)
        assert norm > 1e-4, name
        assert np.linalg.norm(mine[name] - delta) <= bound * norm, name


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"weight_tying": 0.0},
    "last-group-takes-the-rest": {"weight_tying": 0.3},
    "pairs": {"weight_tying": 0.5},
    "all-tied": {"weight_tying": 1.0},
    "one-number": {"weight_tying": 1.0, "u": 1, "r": 1},
    "many-numbers": {"u": 64, "r": 4},
    "rank-above-a-dimension": {"r": 40, "u": 2, "target_modules": ["k_proj", "q_proj"]},
    "other-seed": {"projection_seed": 7, "weight_tying": 0.5},
    "two-kinds": {"target_modules": ["down_proj", "k_proj"], "weight_tying": 0.5},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "weight_tying": 0.4},
    "one-layer": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("projection", [True, False], ids=["saved", "drawn-again"])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_updates_are_those_of_peft(
    settings: dict[str, Any], projection: bool, tmp_path: Path
) -> None:
    model = tuned(llama(), save_projection=projection, **settings)
    folder = saved(model, tmp_path / "adapter")
    assert detect(folder).name == "tinylora-peft"
    assert_equal(read_peft_tinylora(folder, FormatOptions()), true_deltas(model))


@pytest.mark.parametrize("projection", [True, False], ids=["saved", "drawn-again"])
def test_bin_is_read(projection: bool, tmp_path: Path) -> None:
    model = tuned(llama(), save_projection=projection, weight_tying=0.5)
    folder = saved(model, tmp_path / "adapter", safe_serialization=False)
    assert (folder / "adapter_model.bin").is_file()
    assert_equal(read_peft_tinylora(folder, FormatOptions()), true_deltas(model))


@pytest.mark.parametrize("projection", [True, False], ids=["saved", "drawn-again"])
def test_conv1d_and_embeddings_of_gpt2(projection: bool, tmp_path: Path) -> None:
    targets = ["c_attn", "c_proj", "wte", "wpe"]
    model = tuned(gpt2(), target_modules=targets, save_projection=projection, fan_in_fan_out=True)
    folder = saved(model, tmp_path / "adapter")
    adapter = read_peft_tinylora(folder, FormatOptions())
    assert_equal(adapter, true_deltas(model))
    assert {pair.module for pair in adapter.pairs() if pair.embedding} == {
        "transformer.wte",
        "transformer.wpe",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("projection", [True, False], ids=["saved", "drawn-again"])
def test_projections_went_through_the_type_of_the_base(
    projection: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tuned(llama(dtype), save_projection=projection, weight_tying=0.5)
    folder = saved(model, tmp_path / "adapter")
    # PEFT's own delta is rounded to float16 or bfloat16 on return: multiply its parts instead.
    truth: dict[str, np.ndarray[Any, Any]] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, TinyLoraLayer):
            a, b, p = (
                getattr(module, f"tinylora_{part}")["default"].double().numpy() for part in "ABP"
            )
            v = module.tinylora_v["default"][module._tinylora_v_key["default"]]
            truth[name] = b @ np.tensordot(v.detach().double().numpy(), p, 1) @ a
    assert_equal(read_peft_tinylora(folder, FormatOptions()), truth)


def test_second_adapter_keeps_the_numbers_of_the_first(tmp_path: Path) -> None:
    model = tuned(llama(), target_modules=LINEAR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = TinyLoraConfig(
            r=2, u=3, init_weights="uniform", target_modules=["v_proj", "up_proj"]
        )
        model.add_adapter("default2", second)
        model.delete_adapter("default")
        model.set_adapter("default2")
    folder = saved(model, tmp_path) / "default2"
    strip_class(folder)  # so that the stored projections alone can tell
    truth = {
        name: module.get_delta_weight("default2").detach().double().numpy()
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, TinyLoraLayer) and "default2" in module.tinylora_A
    }
    assert len(truth) == 4
    assert_equal(read_peft_tinylora(folder, FormatOptions()), truth)


def test_plain_lora_gives_the_same_logits_in_peft(tmp_path: Path) -> None:
    model = tuned(llama(), weight_tying=0.3)
    source = saved(model, tmp_path / "tiny")
    convert(source, tmp_path / "lora")
    before, after = logits(llama()), logits(model)
    again = logits(loaded(llama(), tmp_path / "lora"))
    effect = (after - before).abs().max()
    assert effect > 1e-2
    assert (again - after).abs().max() < 1e-5 * effect


@pytest.mark.parametrize("projection", [True, False], ids=["saved", "drawn-again"])
def test_written_again_is_the_same_to_the_bit(projection: bool, tmp_path: Path) -> None:
    model = tuned(llama(), weight_tying=0.3, save_projection=projection)
    source = saved(model, tmp_path / "tiny")
    convert(source, tmp_path / "again", to="tinylora-peft")
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("tiny", "again")
    )
    assert first.keys() <= second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(loaded(llama(), tmp_path / "again")), logits(model))
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["save_projection"] is True
    assert config["weight_tying"] == 0.3


def test_other_groups_load_in_peft_as_one_vector(tmp_path: Path) -> None:
    model = tuned(llama(), weight_tying=0.3)
    source = saved(model, tmp_path / "tiny")
    convert(source, tmp_path / "self.safetensors", to="tinylora")
    adapter = detect(tmp_path / "self.safetensors").read(
        tmp_path / "self.safetensors", FormatOptions()
    )
    # The self-contained form remembers whose it was; as a stranger's it is spread over one row.
    stranger = tmp_path / "stranger.safetensors"
    rename_form(tmp_path / "self.safetensors", stranger)
    convert(stranger, tmp_path / "again", to="tinylora-peft")
    effect = (logits(model) - logits(llama())).abs().max()
    difference = (logits(loaded(llama(), tmp_path / "again")) - logits(model)).abs().max()
    assert difference < 1e-5 * effect
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    tiny = carried(adapter)
    assert tiny is not None
    assert written["base_model.tinylora_v.0"].numel() == tiny.coefficients == 30
    assert "base_model.tinylora_v.1" not in written


def rename_form(source: Path, destination: Path) -> None:
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    document = json.loads(metadata["tinylora"])
    metadata["tinylora"] = json.dumps({**document, "form": "carried", "config": {}})
    save_file(load_file(source), destination, metadata)


def test_saved_modules_travel(tmp_path: Path) -> None:
    model = tuned(llama(), modules_to_save=["lm_head"], weight_tying=1.0)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.5)
    source = saved(model, tmp_path / "tiny")
    convert(source, tmp_path / "again", to="tinylora-peft")
    convert(source, tmp_path / "lora")
    for name in ("again", "lora"):
        result = logits(loaded(llama(), tmp_path / name))
        assert (result - logits(model)).abs().max() < 1e-5
    with pytest.raises(LossyConversionError, match=r"lm_head.weight.*no place"):
        convert(source, tmp_path / "self.safetensors", to="tinylora")


def test_plain_lora_is_no_tinylora(tmp_path: Path) -> None:
    convert(saved(tuned(llama()), tmp_path / "tiny"), tmp_path / "lora")
    with pytest.raises(LossyConversionError, match="adapterkit tinylora project"):
        convert(tmp_path / "lora", tmp_path / "tiny2", to="tinylora-peft")


def test_changed_factors_are_no_tinylora_any_more(tmp_path: Path) -> None:
    adapter = read_peft_tinylora(saved(tuned(llama()), tmp_path), FormatOptions())
    assert carried(adapter) is not None
    (key, tensor), *_ = adapter.tensors.items()
    halved = {**adapter.tensors, key: tensor.map(lambda x: x / 2)}
    assert carried(adapter.replace(tensors=halved)) is None
    first = adapter.modules[0]
    assert carried(adapter.replace(scales={**adapter.scales, first: 2.0})) is None
    rest = {k: t for k, t in adapter.tensors.items() if k.module != first}
    assert carried(adapter.replace(tensors=rest)) is None


def strip_class(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_mapping": None}))


def test_order_that_nothing_tells_is_refused(tmp_path: Path) -> None:
    model = tuned(llama(), save_projection=False, weight_tying=0.5)
    folder = saved(model, tmp_path / "adapter")
    strip_class(folder)
    with pytest.raises(BaseRequiredError, match="give the base model with --base"):
        read_peft_tinylora(folder, FormatOptions())
    model.base_model.model.config.save_pretrained(tmp_path / "base")
    convert(folder, tmp_path / "lora", base=tmp_path / "base")
    source = detect(tmp_path / "lora").read(tmp_path / "lora", FormatOptions())
    assert_equal(source, true_deltas(model))


def test_stored_projections_outrank_the_order_of_the_family(tmp_path: Path) -> None:
    """A model whose modules are registered in another order than its class says."""
    model = llama()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention._modules = dict(reversed(attention._modules.items()))
    tuner = tuned(model, weight_tying=0.0)
    folder = saved(tuner, tmp_path / "adapter")
    assert_equal(read_peft_tinylora(folder, FormatOptions()), true_deltas(tuner))


def test_projections_of_an_unindexed_version_are_refused(tmp_path: Path) -> None:
    folder = saved(tuned(llama(), save_projection=False), tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": "0.19.0"}))
    with pytest.raises(UnsupportedError, match="no one can draw them again"):
        read_peft_tinylora(folder, FormatOptions())


def test_wrong_tying_in_the_config_is_noticed(tmp_path: Path) -> None:
    folder = saved(tuned(llama(), weight_tying=0.5), tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weight_tying": 0.4}))
    with pytest.raises(FormatError, match="makes 8 vectors, the file has 7"):
        read_peft_tinylora(folder, FormatOptions())


@pytest.mark.parametrize("outtype", ["f16", "bf16"])
def test_smaller_types_keep_every_digit_of_the_coefficients(outtype: str, tmp_path: Path) -> None:
    model = tuned(llama(), weight_tying=1.0)
    source = saved(model, tmp_path / "tiny")
    report = convert(source, tmp_path / "small", to="tinylora-peft", outtype=outtype)
    assert 0 < report.max_relative_error < {"f16": 1e-3, "bf16": 1e-2}[outtype]
    name = "base_model.tinylora_v.0"
    stored = [
        load_file(tmp_path / each / "adapter_model.safetensors")[name] for each in ("tiny", "small")
    ]
    assert torch.equal(*stored)


@pytest.mark.parametrize("family", known_families())
def test_order_of_a_family_is_that_of_transformers(family: str) -> None:
    model = random_model(family_row(family), 0)
    kinds = (torch.nn.Linear, Conv1D, torch.nn.Embedding)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    assert len(names) > 6
    assert registered(sorted(names), load(family)) == names
