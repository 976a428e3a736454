"""Adapters that trainers write under PEFT's file names, in layouts that PEFT itself would not."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
import transformers.integrations.peft
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from small_llama import small_llama
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import adapterkit
from adapterkit.errors import (
    AdapterKitError,
    BaseRequiredError,
    FormatError,
    NotFoundError,
    UnsupportedError,
)
from adapterkit.formats.peft.keys import KeyReader
from adapterkit.keys import Role, TensorKey

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SCALE = 2.0
EXPERTS, HIDDEN, FFN = 4, 32, 16
PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (
            "language_model.base_model.model.model.layers.0.q.lora_A.default.weight",
            "language_model.model.layers.0.q",
        ),
        ("llm.base_model.model.model.layers.0.q.lora_A.weight", "llm.model.layers.0.q"),
        ("module.model.base_model.model.model.layers.0.q.lora_A.weight", "model.layers.0.q"),
        ("_forward_module.base_model.model.model.layers.0.q.lora_A.weight", "model.layers.0.q"),
        ("pretrained_model.base_model.model.model.layers.0.q.lora_A.weight", "model.layers.0.q"),
        ("actor.base_model.model.model.layers.0.q.lora_A.weight", "model.layers.0.q"),
        ("module.module.base_model.model.model.layers.0.q.lora_A.weight", "model.layers.0.q"),
        ("base_model.base_model.model.model.layers.0.q.lora_A.weight", "model.layers.0.q"),
        ("base_model.base_model.layers.0.q.lora_A.weight", "layers.0.q"),
        ("module.base_model.layers.0.q.lora_A.default.weight", "layers.0.q"),
    ],
)
def test_a_wrapped_part_keeps_its_place_in_the_model(name: str, module: str) -> None:
    keys = KeyReader(Path("x"))
    assert keys.read(name) == TensorKey(module, Role.LORA_A)
    assert any("taken" in str(note) for note in keys.notes())


def test_a_name_is_counted_once_however_often_it_is_wrapped() -> None:
    keys = KeyReader(Path("x"))
    keys.read(f"module.module.{PREFIX * 3}model.layers.0.q.lora_A.weight")
    assert [note.text.partition(":")[0] for note in keys.notes()] == ["1 tensor name"] * 2


def test_a_flat_parameter_of_fsdp_is_named() -> None:
    with pytest.raises(UnsupportedError, match="one rank's slice"):
        KeyReader(Path("x")).read(f"{PREFIX}model.layers.0.q.lora_A._flat_param")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays]:
    """Return what transformers saves of a model with an adapter in small shards, and its ΔW."""
    model = small_llama()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        # transformers 5.24 asks for a PEFT that is not released; it writes with this one alike.
        patch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", peft.__version__)
        model.add_adapter(config)
        model.save_pretrained(folder, max_shard_size="2KB")
    assert len(list(folder.glob("adapter_model-*-of-*.safetensors"))) > 1
    expected = {
        name: layer.get_delta_weight("default").detach().numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    return folder, expected


def deltas(path: Path, base: Path | None = None) -> Arrays:
    return {
        pair.module: pair.scale * (pair.b.numpy() @ pair.a.numpy())
        for pair in adapterkit.read(path, base=base).pairs()
    }


def test_shards_of_transformers_are_one_adapter(sharded: tuple[Path, Arrays]) -> None:
    folder, expected = sharded
    for path in (folder, *folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        found = deltas(path)
        assert found.keys() == expected.keys()
        for module, delta in found.items():
            np.testing.assert_allclose(delta, expected[module], rtol=1e-5, atol=1e-7)


def test_a_missing_shard_is_named(sharded: tuple[Path, Arrays], tmp_path: Path) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "a")
    last = max(folder.glob("adapter_model-*"))
    last.unlink()
    with pytest.raises(NotFoundError, match=f"{last.name}: is missing, one of . shards"):
        adapterkit.read(folder)


def test_what_the_index_lists_must_be_there(sharded: tuple[Path, Arrays], tmp_path: Path) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "a")
    shard = min(folder.glob("adapter_model-*"))
    left = dict(list(load_file(shard).items())[1:])
    save_file(left, shard)
    with pytest.raises(FormatError, match="is in the index and in no shard"):
        adapterkit.read(folder)
    save_file(load_file(max(folder.glob("adapter_model-*"))), shard)
    with pytest.raises(FormatError, match="lies in two shards"):
        adapterkit.read(folder)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    qwen = Qwen3MoeConfig(**sizes, num_experts=EXPERTS, moe_intermediate_size=FFN)
    oss = GptOssConfig(**sizes, num_local_experts=EXPERTS)
    folder = tmp_path_factory.mktemp("mixtures")
    Qwen3MoeForCausalLM(qwen).save_pretrained(folder / "qwen")
    GptOssForCausalLM(oss).save_pretrained(folder / "oss")
    return {"qwen": folder / "qwen", "oss": folder / "oss"}


def saved(folder: Path, tensors: Mapping[str, NDArray[Any]]) -> Path:
    folder.mkdir()
    save_file(
        {PREFIX + name: x for name, x in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


def random(*shape: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tinker(block: str = "model.layers.0.") -> Arrays:
    """Return the tensors of a raw Tinker adapter: gate and up share A, down shares B."""
    inward, outward = (1, 4, HIDDEN), (EXPERTS, FFN, 4)
    return {
        f"{block}mlp.experts.w1.lora_A.weight": random(*inward, seed=1),
        f"{block}mlp.experts.w1.lora_B.weight": random(*outward, seed=2),
        f"{block}mlp.experts.w3.lora_A.weight": random(*inward, seed=3),
        f"{block}mlp.experts.w3.lora_B.weight": random(*outward, seed=4),
        f"{block}mlp.experts.w2.lora_A.weight": random(EXPERTS, 4, FFN, seed=5),
        f"{block}mlp.experts.w2.lora_B.weight": random(1, HIDDEN, 4, seed=6),
        "model.unembed_tokens.lora_A.weight": random(4, HIDDEN, seed=7),
        "model.unembed_tokens.lora_B.weight": random(64, 4, seed=8),
    }


def product(tensors: Arrays, leaf: str) -> NDArray[Any]:
    stem = f"model.layers.0.mlp.experts.{leaf}.lora_"
    return SCALE * tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]


@pytest.mark.parametrize("interleaved", [False, True])
def test_tinkers_experts_stand_where_the_base_has_them(
    interleaved: bool, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    base = mixtures["oss" if interleaved else "qwen"]
    tensors = tinker()
    found = deltas(saved(tmp_path / "a", tensors), base)
    gate, up = product(tensors, "w1"), product(tensors, "w3")
    joint = (
        np.stack([gate, up], 2).reshape(EXPERTS, 2 * FFN, HIDDEN)
        if interleaved
        else np.concatenate([gate, up], 1)
    )
    block = "model.layers.0.mlp.experts."
    assert found.keys() == {f"{block}gate_up_proj", f"{block}down_proj", "lm_head"}
    np.testing.assert_allclose(found[f"{block}gate_up_proj"], joint, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[f"{block}down_proj"], product(tensors, "w2"), rtol=1e-5)
    adapterkit.convert(tmp_path / "a", tmp_path / "a.gguf", base=base)


def test_tinkers_experts_are_placed_by_a_base_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(BaseRequiredError, match="give the base model with --base"):
        adapterkit.read(saved(tmp_path / "a", tinker()))


def test_an_empty_pair_holds_a_place_only(mixtures: dict[str, Path], tmp_path: Path) -> None:
    tensors = tinker()
    stem = "model.layers.0.mlp.experts.w3.lora_"
    tensors[f"{stem}A.weight"] = np.zeros((1, 4, 0), np.float32)
    tensors[f"{stem}B.weight"] = np.zeros((EXPERTS, 0, 4), np.float32)
    found = deltas(saved(tmp_path / "a", tensors), mixtures["qwen"])
    joint = found["model.layers.0.mlp.experts.gate_up_proj"]
    np.testing.assert_allclose(joint[:, :FFN], product(tensors, "w1"), rtol=1e-5, atol=1e-6)
    assert not joint[:, FFN:].any()


@pytest.mark.parametrize("experts", [(1, 1), (2, 3)])
def test_counts_of_experts_that_disagree_are_refused(
    experts: tuple[int, int], mixtures: dict[str, Path], tmp_path: Path
) -> None:
    tensors = tinker()
    stem = "model.layers.0.mlp.experts.w1.lora_"
    tensors[f"{stem}A.weight"] = random(experts[0], 4, HIDDEN, seed=1)
    tensors[f"{stem}B.weight"] = random(experts[1], FFN, 4, seed=1)
    with pytest.raises(AdapterKitError, match="experts"):
        adapterkit.read(saved(tmp_path / "a", tensors), base=mixtures["qwen"])


def test_experts_in_lists_are_the_rows_of_one_parameter(
    mixtures: dict[str, Path], tmp_path: Path
) -> None:
    tensors: Arrays = {}
    for e in range(EXPERTS - 1):  # the last one was not trained
        for leaf, inward, outward in (
            ("gate_up_projs", HIDDEN, 2 * FFN),
            ("down_projs", FFN, HIDDEN),
        ):
            stem = f"model.layers.0.mlp.experts.{leaf}.{e}.lora_"
            tensors[f"{stem}A.weight"] = random(4, inward, seed=e)
            tensors[f"{stem}B.weight"] = random(outward, 4, seed=9 + e)
    base = mixtures["oss"]
    found = deltas(saved(tmp_path / "a", tensors), base)
    for leaf in ("gate_up_proj", "down_proj"):
        stack = found[f"model.layers.0.mlp.experts.{leaf}"]
        assert stack.shape[0] == EXPERTS
        for e, delta in enumerate(stack):
            stem = f"model.layers.0.mlp.experts.{leaf}s.{e}.lora_"
            expected = (
                SCALE * tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
                if f"{stem}A.weight" in tensors
                else np.zeros_like(delta)
            )
            np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6)
    adapterkit.convert(tmp_path / "a", tmp_path / "p", base=base)
    assert deltas(tmp_path / "p", base).keys() == found.keys()


def test_a_whole_state_dict_is_the_adapter_in_it(tmp_path: Path) -> None:
    """What training saved of the frozen base is left out, and a module to save is not."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "lm_head"],
        "modules_to_save": ["model.norm"],
        "init_lora_weights": False,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(small_llama(), LoraConfig(**settings))
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save.default.weight.mul_(2)
    folder = tmp_path / "a"
    model.peft_config["default"].save_pretrained(folder)
    torch.save(model.state_dict(), folder / "adapter_model.bin")
    adapter = adapterkit.read(folder)
    norm = adapter.tensors[TensorKey("model.norm.weight", Role.FULL)].numpy()
    assert (norm == 2).all()
    assert [key for key in adapter.tensors if key.role is Role.FULL] == [
        TensorKey("model.norm.weight", Role.FULL)
    ]
    assert adapter.provenance
    assert any("the frozen base model" in str(note) for note in adapter.provenance.notes)
    found = deltas(folder)
    expected = {
        name.removeprefix(PREFIX): layer.get_delta_weight("default").detach().numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert found.keys() == expected.keys()
    for module, delta in found.items():
        np.testing.assert_allclose(delta, expected[module], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("enabled", [(True, False, True), (False, True, False), (True, True, True)])
def test_slots_of_a_fused_layer_are_those_of_old_peft(
    enabled: tuple[bool, ...], tmp_path: Path
) -> None:
    """MergedLinear of PEFT 0.2: a linear layer, a convolution in groups, and rows of zeros."""
    count, rank, wide, high = sum(enabled), 3, 10, 7
    down = torch.nn.Linear(wide, rank * count, bias=False)
    up = torch.nn.Conv1d(rank * count, high * count, kernel_size=1, groups=count, bias=False)
    name = "base_model.model.transformer.h.0.attn.c_attn"
    save_file(
        {
            f"{name}.lora_A.weight": down.weight.detach().numpy(),
            f"{name}.lora_B.weight": up.weight.detach().numpy(),
        },
        tmp_path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 12,
        "target_modules": ["c_attn"],
        "enable_lora": list(enabled),
        "merge_weights": False,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    x = torch.randn(5, wide)
    with torch.no_grad():
        rows = torch.tensor(enabled).repeat_interleave(high)
        wanted = torch.zeros(5, high * len(enabled))
        wanted[:, rows] = up(down(x).T).T * 12 / rank
    adapterkit.convert(tmp_path, tmp_path / "out", to="peft")
    assert "enable_lora" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for path in (tmp_path, tmp_path / "out"):
        (pair,) = adapterkit.read(path).pairs()
        delta = pair.scale * pair.b.numpy() @ pair.a.numpy()
        torch.testing.assert_close(x @ torch.tensor(delta).T, wanted, rtol=1e-5, atol=1e-5)


def test_slots_that_the_factors_do_not_have_are_refused(tmp_path: Path) -> None:
    name = "base_model.model.transformer.h.0.attn.c_attn"
    save_file(
        {
            f"{name}.lora_A.weight": np.ones((6, 8), np.float32),
            f"{name}.lora_B.weight": np.ones((8, 2, 1), np.float32),
        },
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "enable_lora": [True, False, True]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="not those of 2 of 3 slots"):
        adapterkit.read(tmp_path)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8, bias=False)


class Outer(nn.Module):
    def __init__(self, *others: str) -> None:
        super().__init__()
        self.module = Inner()
        for name in others:
            self.add_module(name, Outer())


@pytest.mark.parametrize("others", [(), ("encoder",)])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_an_attribute_of_the_name_of_a_wrapper_stays(
    tmp_path: Path, others: tuple[str, ...], wrapper: str
) -> None:
    model = Outer(*others)
    (tmp_path / "base").mkdir()
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    save_file(state, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "mine", "architectures": ["Mine"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    trained.save_pretrained(str(tmp_path / "a"))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    stored = load_file(weights)
    save_file({n.replace(PREFIX, PREFIX + wrapper): x for n, x in stored.items()}, weights)
    real = {f"{name}module.q_proj" for name in ("", *(f"{other}." for other in others))}
    assert set(adapterkit.read(tmp_path / "a", base=tmp_path / "base").modules) == real
    adapterkit.merge_into([tmp_path / "a"], tmp_path / "base", tmp_path / "merged")
    alone = adapterkit.read(tmp_path / "a")
    if others:  # what modules do not share is no wrapper of the model
        assert set(alone.modules) == real
    else:
        assert set(alone.modules) == {"q_proj"}
        assert alone.provenance is not None
        assert any("with --base" in str(note) for note in alone.provenance.notes)
