"""Experts: PEFT's `target_parameters` in every layout that it has had.

The layouts are written here from their description, factor by factor; that the current one is what
PEFT itself means is asked of PEFT.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from engine import (
    BaseFixture,
    convert_adapter,
    engine_logprobs,
    family_row,
    kl,
    logprobs,
    make_adapter,
    make_base,
    max_kl,
    prompts_for,
)
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.numpy import save_file

import adapterkit
from adapterkit.errors import (
    FormatError,
    LossyConversionError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]

pytestmark = pytest.mark.engine

EXPERTS, RANK, ALPHA, HIDDEN = 3, 2, 5, 32
SCALE = ALPHA / RANK

# Class, spelling of its expert module, and in which releases A holds the outputs of the experts.
# Mixtral's parameters are (E, out, in). GPT-OSS's are (E, in, out) and its module says so; Llama
# 4's are too, and its module does not.
CLASSES = {
    "mixtral": ("MixtralForCausalLM", "model.layers.0.mlp.experts", {"0.18.0", "0.19.0"}),
    "gpt-oss": ("GptOssForCausalLM", "model.layers.0.mlp.experts", {"0.19.0"}),
    "llama4": ("Llama4ForCausalLM", "model.layers.0.feed_forward.experts", {"0.19.1", "0.21.2"}),
}
VERSIONS = ("0.18.0", "0.19.0", "0.19.1", "0.21.2")
# Width of the experts -> shapes: (3, 96, 32) and (3, 32, 48); gate and up square; down square.
WIDTHS = (48, 16, 32)

Factors = tuple["Array", "Array"]


def factors(width: int) -> dict[str, Factors]:
    """Return A (E, r, in) and B (E, out, r) of both parameters."""
    random = np.random.default_rng(width)
    shapes = {"gate_up_proj": (2 * width, HIDDEN), "down_proj": (HIDDEN, width)}
    return {
        name: (
            random.normal(size=(EXPERTS, RANK, columns)).astype(np.float32),
            random.normal(size=(EXPERTS, rows, RANK)).astype(np.float32),
        )
        for name, (rows, columns) in shapes.items()
    }


def folded(a: Array, b: Array, *, outputs_in_a: bool) -> Factors:
    """Fold experts into the rank, one number at a time: row e·r + k of A, column k·E + e of B."""
    first, second = (b.transpose(0, 2, 1), a.transpose(0, 2, 1)) if outputs_in_a else (a, b)
    stored_a = np.zeros((EXPERTS * RANK, first.shape[2]), np.float32)
    stored_b = np.zeros((second.shape[1], RANK * EXPERTS), np.float32)
    for expert in range(EXPERTS):
        for k in range(RANK):
            stored_a[expert * RANK + k] = first[expert, k]
            stored_b[:, k * EXPERTS + expert] = second[expert, :, k]
    return stored_a, stored_b


def write(
    folder: Path, module: str, pairs: Mapping[str, Factors], config: Mapping[str, Any]
) -> Path:
    """Save folded factors under PEFT's nested names: gate_up_proj is wrapped first."""
    nested = {"gate_up_proj": ".base_layer" if len(pairs) > 1 else "", "down_proj": ""}
    tensors: dict[str, Array] = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}{nested[name]}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}{nested[name]}.lora_B.weight"] = b
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    parent = ".".join(module.split(".")[-2:])
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [],
        "target_parameters": [f"{parent}.{name}" for name in pairs],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def base_config(folder: Path, family: str, width: int) -> Path:
    config = {
        "architectures": [CLASSES[family][0]],
        "num_local_experts": EXPERTS,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "hidden_size": HIDDEN,
        "intermediate_size": width,
        "intermediate_size_mlp": 2 * width,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def updates(path: Path, base: Path | None = None) -> dict[str, Array]:
    """Return the update of every expert, (E, out, in), by parameter."""
    found = {}
    for pair in adapterkit.read(path, base=base).pairs():
        product = pair.b.numpy().astype(float) @ pair.a.numpy().astype(float)
        found[pair.module.rpartition(".")[2]] = pair.scale * product
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", CLASSES)
def test_every_layout_means_the_same_updates(
    family: str, version: str, width: int, tmp_path: Path
) -> None:
    _, module, outputs_in_a = CLASSES[family]
    pairs = factors(width)
    stored = {
        name: folded(a, b, outputs_in_a=version in outputs_in_a) for name, (a, b) in pairs.items()
    }
    path = write(tmp_path / "adapter", module, stored, {"peft_version": version})
    found = updates(path, base_config(tmp_path, family, width))
    assert found.keys() == pairs.keys()
    for name, (a, b) in pairs.items():
        wanted = SCALE * (b.astype(float) @ a.astype(float))
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("outputs_in_a", [False, True])
def test_widths_tell_where_neither_base_nor_version_is_known(
    outputs_in_a: bool, tmp_path: Path
) -> None:
    pairs = factors(48)
    stored = {name: folded(a, b, outputs_in_a=outputs_in_a) for name, (a, b) in pairs.items()}
    found = updates(write(tmp_path / "a", CLASSES["mixtral"][1], stored, {}))
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose(found[name], SCALE * (b @ a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [{}, {"peft_version": "0.21.2"}], ids=["no version", "no base"])
def test_square_experts_of_unknown_origin_are_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (a, b) = factors(16)["gate_up_proj"]
    path = write(
        tmp_path / "a",
        CLASSES["mixtral"][1],
        {"gate_up_proj": folded(a, b, outputs_in_a=False)},
        config,
    )
    with pytest.raises(UnsupportedError, match="do not tell which factor is which"):
        adapterkit.read(path)


def test_class_that_was_trained_stands_in_for_the_base(tmp_path: Path) -> None:
    (a, b) = factors(16)["gate_up_proj"]
    config = {
        "peft_version": "0.18.1",
        "auto_mapping": {"base_model_class": "MixtralForCausalLM"},
    }
    stored = {"gate_up_proj": folded(a, b, outputs_in_a=True)}
    found = updates(write(tmp_path / "a", CLASSES["mixtral"][1], stored, config))
    np.testing.assert_allclose(found["gate_up_proj"], SCALE * (b @ a), rtol=1e-4, atol=1e-4)


def test_ranks_that_do_not_divide_by_the_experts_are_malformed(tmp_path: Path) -> None:
    (a, b) = factors(48)["gate_up_proj"]
    stored = {"gate_up_proj": folded(a, b, outputs_in_a=False)}
    path = write(tmp_path / "a", CLASSES["mixtral"][1], stored, {"r": 4})
    with pytest.raises(FormatError, match="not a multiple of rank 4"):
        adapterkit.read(path, base=base_config(tmp_path, "mixtral", 48))


def test_wrappers_that_target_parameters_do_not_explain_are_malformed(tmp_path: Path) -> None:
    pairs = {name: folded(a, b, outputs_in_a=False) for name, (a, b) in factors(48).items()}
    config = {"peft_version": "0.21.2", "target_parameters": ["mlp.experts.gate_up_proj"]}
    with pytest.raises(FormatError, match="2 nested pairs"):
        adapterkit.read(write(tmp_path / "a", CLASSES["mixtral"][1], pairs, config))


@pytest.fixture(scope="module", params=["mixtral", "gpt-oss", "llama4", "qwen3moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row(request.param), tmp_path_factory.mktemp(request.param))


def wrapped(model: Any) -> dict[str, Array]:
    """Return PEFT's own dense update of every wrapped parameter, by its path."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ParamWrapper):
            module = name.removeprefix("base_model.model.").replace(".base_layer", "")
            delta = layer.get_delta_weight("default").detach().numpy()
            suffix = "" if layer.parameter_name == "weight" else f".{layer.parameter_name}"
            found[module + suffix] = delta
    return found


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"r": 1}], ids=str)
def test_current_layout_is_what_peft_applies(
    settings: dict[str, Any], base: BaseFixture, tmp_path: Path
) -> None:
    tuned = make_adapter(base, tmp_path / "a", **settings)
    adapter = adapterkit.read(tmp_path / "a", base=base.hf)
    pairs = {pair.module: pair for pair in adapter.pairs()}
    deltas = wrapped(tuned.model)
    assert deltas
    turned = base.row.family in {"gpt-oss", "llama4"}
    for name, delta in deltas.items():
        pair = pairs[name]
        ours = pair.scale * (pair.b.numpy() @ pair.a.numpy())
        # Their parameters are (E, in, out), an update here is (E, out, in).
        theirs = delta.swapaxes(-1, -2) if turned and delta.ndim == 3 else delta
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


def test_patterns_meet_parameters_as_in_peft(base: BaseFixture, tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"gate_up_proj": 3, "gate.weight": 5, "router.weight": 5, "q_proj": 6},
        "alpha_pattern": {r"layers\.1\..*\.down_proj": 7, ".*weight": 2},
    }
    # PEFT applies patterns to parameters, and then warns that they matched no module.
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        tuned = make_adapter(base, tmp_path / "a", **patterns)
    convert_adapter(tmp_path / "a", base, tmp_path / "a.gguf")
    prompts = prompts_for(base)
    answer = engine_logprobs(base.gguf, prompts, [(tmp_path / "a.gguf", 1.0)])
    assert max_kl(logprobs(tuned.model, prompts), answer) < base.tolerance


def test_a_router_of_a_rank_of_its_own_is_merged_as_the_parameter_that_it_is(
    base: BaseFixture, tmp_path: Path
) -> None:
    """Its pattern meets `router.weight` in PEFT: under the module's name it would say nothing."""
    patterns = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {".*weight": 2}}
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        tuned = make_adapter(base, tmp_path / "a", **patterns)
    prompts = prompts_for(base)
    wanted = logprobs(tuned.model, prompts)
    # Square experts cannot be read without a base.
    for given in (base.hf,) if base.row.name == "qwen3moe" else (base.hf, None):
        out = tmp_path / f"merged-{given is None}"
        sources = [tmp_path / "a", tmp_path / "a"]
        adapterkit.merge_files(sources, out, weights=[1.5, -0.5], base=given)
        model = type(base.model).from_pretrained(
            base.hf, attn_implementation="eager", dtype=torch.float32
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            merged = PeftModel.from_pretrained(model, out)
        assert max_kl(wanted, logprobs(merged, prompts)) < 1e-9


def test_targets_of_transformers_4_that_peft_translates(tmp_path: Path) -> None:
    # PEFT turns these names into target_parameters without a module, and doubles a rank.
    row = family_row("qwen3moe")
    old = make_base(row, tmp_path)
    targets = ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"]
    settings = {"target_modules": targets, "target_parameters": None}
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        tuned = make_adapter(old, tmp_path / "a", **settings)
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(saved["target_parameters"]) == {"gate.weight", "gate_up_proj", "down_proj"}
    convert_adapter(tmp_path / "a", old, tmp_path / "a.gguf")
    prompts = prompts_for(old)
    adapted = logprobs(tuned.model, prompts)
    assert kl(logprobs(old.model, prompts), adapted).min() > 1e-2
    answer = engine_logprobs(old.gguf, prompts, [(tmp_path / "a.gguf", 1.0)])
    assert max_kl(adapted, answer) < old.tolerance


def test_written_experts_load_into_peft_and_mean_the_same(
    base: BaseFixture, tmp_path: Path
) -> None:
    tuned = make_adapter(base, tmp_path / "a")
    convert_adapter(tmp_path / "a", base, tmp_path / "a.gguf")
    convert_adapter(tmp_path / "a.gguf", base, tmp_path / "back", given="hf")
    model = type(base.model).from_pretrained(
        base.hf, attn_implementation="eager", dtype=torch.float32
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        loaded = PeftModel.from_pretrained(model, tmp_path / "back")
    prompts = prompts_for(base)
    assert max_kl(logprobs(tuned.model, prompts), logprobs(loaded, prompts)) < 1e-9


def test_experts_that_llama_cpp_adapts_wrongly_are_refused(tmp_path: Path) -> None:
    # It scales what comes out of an expert of Gemma 4, and leaves out what the adapter adds.
    base = make_base(family_row("gemma4-moe"), tmp_path)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    tuned = make_adapter(base, tmp_path / "a", target_modules=["q_proj"], target_parameters=targets)
    with pytest.raises(LossyConversionError) as refused:
        convert_adapter(tmp_path / "a", base, tmp_path / "a.gguf")
    (loss,) = refused.value.losses
    assert loss.subject.startswith("model.layers.0.experts.down_proj and 1 more")
    assert "per_expert_scale scales what an expert gives" in loss.message
    assert "merge it into the base" in loss.message
    adapterkit.merge_into([tmp_path / "a"], base.hf, tmp_path / "merged")
    merged = type(base.model).from_pretrained(
        tmp_path / "merged", attn_implementation="eager", dtype=torch.float32
    )
    prompts = prompts_for(base)
    assert max_kl(logprobs(tuned.model, prompts), logprobs(merged, prompts)) < 1e-9
