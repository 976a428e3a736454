"""PEFT itself as the oracle: what it saves is read right, and what we write it loads and runs."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from small_llama import saved_llama
from transformers import LlamaForCausalLM

from adapterkit.base import open_base
from adapterkit.conversion import convert
from adapterkit.files import write
from adapterkit.formats.peft.reader import read_peft
from adapterkit.formats.protocol import FormatOptions
from adapterkit.keys import Role, TensorKey
from adapterkit.lora_config.config import LoraConfig as ReadConfig
from adapterkit.model import AdapterTensorSet, Update
from adapterkit.passes.pooling import decided
from adapterkit.passes.protocol import Context
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

PROMPT = torch.tensor([[3, 17, 44, 9, 60, 2]])

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "defaults": {"target_modules": ["v_proj"]},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj"]},
    "rank-pattern": {
        "r": 4,
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
        "target_modules": ["q_proj", "down_proj"],
    },
    "both-patterns-rslora": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 7, "^model.layers.0.self_attn.q_proj": 1},
        "target_modules": ["q_proj", "down_proj"],
    },
    "alpha-zero": {"r": 4, "lora_alpha": 0, "target_modules": ["q_proj"]},
    "fractional-alpha": {"r": 3, "lora_alpha": 2.5, "target_modules": ["o_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "lora-bias": {"r": 4, "lora_bias": True, "target_modules": ["o_proj"]},
    "bias-lora-only": {"r": 4, "bias": "lora_only", "target_modules": ["q_proj"]},
    "bias-all": {"r": 4, "bias": "all", "target_modules": ["q_proj"]},
    "saved-head": {"r": 4, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "saved-norm": {"r": 4, "modules_to_save": ["norm"], "target_modules": ["q_proj"]},
    "token-rows": {
        "r": 4,
        "trainable_token_indices": {"embed_tokens": [1, 5, 7]},
        "target_modules": ["q_proj"],
    },
    "embedding-and-output": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "one-layer": {"r": 4, "layers_to_transform": [1], "target_modules": ["q_proj"]},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "regex": {"r": 4, "target_modules": r".*\.1\.(self_attn\.q|mlp\.down)_proj"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("base"), attention_bias=True)


def tuned(base: Path, folder: Path, **settings: Any) -> PeftModel:
    """Save an adapter with random values everywhere, and return the model that carries it."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        warnings.filterwarnings("ignore", ".*modules outside of its modules.*", UserWarning)
        # PEFT 0.21 takes the bias on B for a factor that was cut to one axis.
        warnings.filterwarnings("ignore", "(?s).*lora_B.bias.*", UserWarning)
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(base),
            LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings),
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "magnitude" not in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif parameter.requires_grad:
                    parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
        model.save_pretrained(folder)
    return model.eval()


def loaded(base: Path, adapter: Path) -> tuple[PeftModel, Any]:
    """Load an adapter as PEFT does, and return what it found missing or unexpected too."""
    config = LoraConfig.from_pretrained(adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        model = PeftModel(LlamaForCausalLM.from_pretrained(base), config)
        result = model.load_adapter(adapter, "default", is_trainable=False)
    return model.eval(), result


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_saves_comes_back_to_peft(variant: str, base: Path, tmp_path: Path) -> None:
    model = tuned(base, tmp_path / "saved", **VARIANTS[variant])
    report = convert(tmp_path / "saved", tmp_path / "written", base=base)
    again, result = loaded(base, tmp_path / "written")
    assert report.max_relative_error == 0
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora" in name or "modules_to" in name]
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_effective_updates_are_those_of_peft(variant: str, base: Path, tmp_path: Path) -> None:
    model = tuned(base, tmp_path, **VARIANTS[variant])
    ours = dense(read_peft(tmp_path, FormatOptions()))
    checked = 0
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or VARIANTS[variant].get("use_dora"):
            continue
        expected = layer.get_delta_weight("default").detach().double().numpy()
        scale = np.linalg.norm(expected)
        assert np.linalg.norm(ours[name] - expected) <= 1e-6 * scale
        assert scale or not np.any(ours[name])
        checked += 1
    assert checked == len(ours) or VARIANTS[variant].get("use_dora")


def dense(adapter: AdapterTensorSet) -> dict[str, np.ndarray[Any, Any]]:
    """ΔW of every module in the orientation of the base weight, float64."""
    updates: dict[str, np.ndarray[Any, Any]] = {}
    for pair in adapter.pairs():
        product = pair.scale * (pair.b.numpy().astype("float64") @ pair.a.numpy().astype("float64"))
        updates[pair.module] = product.T if pair.embedding else product
    return updates


def test_overlapping_patterns_follow_the_file(base: Path, tmp_path: Path) -> None:
    """PEFT sorts the saved patterns, so that the winner changes: what counts is what it loads."""
    tuned(
        base,
        tmp_path,
        r=4,
        target_modules=["q_proj"],
        alpha_pattern={"q_proj": 4, "layers.0.self_attn.q_proj": 64},
    )
    model, _ = loaded(base, tmp_path)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert (
        read_peft(tmp_path, FormatOptions()).scales["model.layers.0.self_attn.q_proj"]
        == layer.scaling["default"]
    )
    assert layer.scaling["default"] == 16


LEAKS = {
    "adapter-name": lambda name: name.replace(".weight", ".default.weight"),
    "compiled": lambda name: name.replace("model.layers", "_orig_mod.model.layers"),
    "data-parallel": lambda name: f"module.{name}",
    "sharded": lambda name: name.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
    "checkpointed": lambda name: name.replace(
        "self_attn", "_checkpoint_wrapped_module._fsdp_wrapped_module.self_attn"
    ),
    "held": lambda name: f"model.{name}",
    "part-of-a-model": lambda name: name.replace(
        "base_model.model.model", "model.base_model.model"
    ),
    "doubled": lambda name: f"base_model.model.{name}",
    "bare": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_leaked_wrappers_are_taken_off_and_reported(leak: str, base: Path, tmp_path: Path) -> None:
    model = tuned(base, tmp_path / "a", r=4, target_modules=["q_proj"])
    weights = tmp_path / "a" / "adapter_model.safetensors"
    save_file({LEAKS[leak](name): x for name, x in load_file(weights).items()}, weights)
    report = convert(tmp_path / "a", tmp_path / "b")
    again, result = loaded(base, tmp_path / "b")
    assert not result.unexpected_keys
    assert any("4 tensor names" in note for note in report.notes)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_bin_and_safetensors_hold_the_same(base: Path, tmp_path: Path) -> None:
    model = tuned(base, tmp_path / "a", r=4, target_modules=["q_proj"])
    (tmp_path / "b").mkdir()
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "b" / "adapter_model.bin")
    config = (tmp_path / "a" / "adapter_config.json").read_text()
    (tmp_path / "b" / "adapter_config.json").write_text(config)
    convert(tmp_path / "b", tmp_path / "c")
    again, _ = loaded(base, tmp_path / "c")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_named_adapters_lie_in_sub_directories(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "all" / "pirate", r=4, target_modules=["q_proj"])
    found = read_peft(tmp_path / "all", FormatOptions())
    assert found.provenance
    assert "sub-directory pirate" in found.provenance.notes[0]
    weights = tmp_path / "all" / "pirate" / "adapter_model.safetensors"
    assert read_peft(weights, FormatOptions()).modules == found.modules


def test_block_diagonal_factors_are_written_out(base: Path, tmp_path: Path) -> None:
    blocks = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    model = tuned(base, tmp_path / "a", r=4, target_modules=["q_proj", "o_proj"], use_bdlora=blocks)
    convert(tmp_path / "a", tmp_path / "b")
    again, _ = loaded(base, tmp_path / "b")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def test_pooled_inputs_are_written_out(tmp_path: Path) -> None:
    """QA-LoRA needs a GPTQ layer to train; its forward pass runs on any."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    torch.manual_seed(2)
    a, b, group = torch.randn(4, 8), torch.randn(16, 4), 4
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"r": 4, "lora_alpha": 12, "use_qalora": True, "qalora_group_size": group}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))

    down, up = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 16, bias=False)
    down.weight.data, up.weight.data = a, b
    layer = SimpleNamespace(
        lora_A={"default": down},
        lora_B={"default": up},
        lora_dropout={"default": torch.nn.Identity()},
        scaling={"default": 3.0},
        qalora_group_size={"default": group},
        in_features=32,
        training=False,
    )
    x = torch.randn(5, 32)
    with torch.no_grad():
        expected = QALoraLinearVariant.forward(layer, "default", x, torch.zeros(5, 16))
    (tmp_path / "base").mkdir()
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**fields, **quantised}))
    base = open_base(tmp_path / "base")
    update = dense(read_peft(tmp_path, FormatOptions(base=base)))["model.layers.0.self_attn.q_proj"]
    later = decided(read_peft(tmp_path, FormatOptions()), Context(base=base)).adapter
    assert np.array_equal(dense(later)["model.layers.0.self_attn.q_proj"], update)
    ours = x.double().numpy() @ update.T
    assert np.linalg.norm(ours - expected.numpy()) < 1e-6 * np.linalg.norm(ours)


@pytest.mark.parametrize("name", ["kasa_config", "arrow_config"])
def test_settings_that_are_no_weight_update_are_refused_by_name(name: str, tmp_path: Path) -> None:
    from adapterkit.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match=name):
        ReadConfig({"peft_type": "LORA", name: {"x": 1}}, tmp_path)


def test_a_bias_of_some_modules_is_one_of_all_to_peft(tmp_path: Path) -> None:
    """lora_bias is a setting of all modules: where there is none, zeros stand for it."""
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)).double()
    generator = np.random.default_rng(5)
    updates = [
        Update(
            str(place),
            LazyTensor.of(generator.standard_normal((2, layer.in_features))),
            LazyTensor.of(generator.standard_normal((layer.out_features, 2))),
            0.7,
        )
        for place, layer in enumerate(network)
    ]
    bias = generator.standard_normal(4)
    key = TensorKey("1", Role.LORA_BIAS)
    adapter = AdapterTensorSet.of(updates, {key: LazyTensor.of(bias)})
    assert write(adapter, tmp_path / "a").max_relative_error == 0
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"CAUSAL_LM"', "null"))  # it generates nothing
    before = [(layer.weight.clone(), layer.bias.clone()) for layer in network]
    merged = PeftModel.from_pretrained(network, str(tmp_path / "a")).merge_and_unload()
    for update, (weight, old), layer, extra in zip(updates, before, merged, (0, bias), strict=True):
        want = 0.7 * update.b.numpy() @ update.a.numpy()
        assert np.allclose((layer.weight - weight).detach().numpy(), want, atol=1e-6)
        assert np.allclose((layer.bias - old).detach().numpy(), 0.7 * extra, atol=1e-6)


@pytest.mark.parametrize(("container", "target"), [("out", "head.out"), ("mid", "out")])
def test_a_target_hits_no_module_that_holds_others(
    container: str, target: str, tmp_path: Path
) -> None:
    """PEFT raises where a container has the name of a target: the whole path is written then."""
    head, inner = (torch.nn.ModuleDict({"out": torch.nn.Linear(4, 4)}) for _ in range(2))
    inner["dense"] = inner.pop("out")
    network = torch.nn.ModuleDict({"head": head, "tail": torch.nn.ModuleDict({container: inner})})
    (tmp_path / "base").mkdir()
    save_file(network.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(
        '{"model_type": "net", "architectures": ["Net"]}'
    )
    factors = np.ones((2, 4), np.float32)
    update = Update("head.out", LazyTensor.of(factors), LazyTensor.of(factors.T), 0.5)
    write(AdapterTensorSet.of([update], {}), tmp_path / "a", base=tmp_path / "base")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == [
        target
    ]
    tuned = PeftModel.from_pretrained(network, str(tmp_path / "a"))
    adapted = [name for name, module in tuned.named_modules() if isinstance(module, LoraLayer)]
    assert adapted == ["base_model.model.head.out"]


def test_base_copy_is_no_part_of_the_update(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path, r=4, target_modules=["lm_head"])
    adapter = read_peft(tmp_path, FormatOptions())
    assert TensorKey("lm_head", Role.BASE_COPY) in adapter.tensors
    assert [pair.module for pair in adapter.pairs()] == ["lm_head"]
