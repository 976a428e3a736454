"""PEFT's own layers as the oracle: its other tuners, read as LoRA, are the same model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from dense_updates import dense
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from tuner_models import FIXTURES, TARGETS, tuned
from tuner_models import base as base  # noqa: PLC0414  (a fixture)
from tuner_models import quiet as quiet  # noqa: PLC0414  (a fixture)

import adapterkit
from adapterkit.base import open_base
from adapterkit.formats.lycoris.reader import read_lycoris
from adapterkit.formats.peft.tuners import read_tuner
from adapterkit.formats.peft.tuners_rules import RULES
from adapterkit.formats.peft.tuners_whole import WHOLE
from adapterkit.formats.protocol import FormatOptions
from adapterkit.keys import Role, TensorKey
from adapterkit.registry import detect

pytestmark = pytest.mark.slow


transformers.utils.logging.disable_progress_bar()
PROMPT = torch.tensor([[3, 17, 44, 9, 60, 2]])
BANK = {"num_vectors": 10, "vector_length": 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLora", {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 5}),
    "adalora-no-alpha": ("AdaLora", {"init_r": 6, "total_step": 9, "tfinal": 1, "lora_alpha": 0}),
    "loha": ("LoHa", {"r": 3, "alpha": 5}),
    "loha-wide": ("LoHa", {"r": 6, "alpha": 5}),
    "loha-patterns": (
        "LoHa",
        {"r": 3, "alpha": 5, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 7}},
    ),
    "lokr": ("LoKr", {"r": 2, "alpha": 3}),
    "lokr-both": ("LoKr", {"r": 1, "alpha": 3, "decompose_both": True}),
    "lokr-whole": ("LoKr", {"r": 16, "alpha": 3}),
    "lokr-factor": ("LoKr", {"r": 2, "alpha": 3, "decompose_factor": 2}),
    "lokr-patterns": (
        "LoKr",
        {"r": 2, "alpha": 3, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"k_proj": 7}},
    ),
    "delora": ("Delora", {"r": 4}),
    "delora-patterns": ("Delora", {"r": 4, "rank_pattern": {"q_proj": 2}}),
    "gralora": ("Gralora", {"r": 4, "gralora_k": 2, "alpha": 6}),
    "gralora-hybrid": ("Gralora", {"r": 8, "gralora_k": 4, "alpha": 6, "hybrid_r": 2}),
    "gralora-fine": ("Gralora", {"r": 8, "gralora_k": 8, "alpha": 6}),
    "hra": ("HRA", {"r": 4}),
    "hra-odd": ("HRA", {"r": 5, "init_weights": False}),
    "hra-orthogonal": ("HRA", {"r": 4, "apply_GS": True}),
    "miss": ("Miss", {"r": 4}),
    "miss-remainder": ("Miss", {"r": 5}),
    "miss-mini": ("Miss", {"r": 4, "mini_r": 8, "init_weights": "mini"}),
    "vera": ("Vera", {"r": 4}),
    "vblora": ("VBLoRA", {"r": 2, **BANK}),
    "vblora-top-3": ("VBLoRA", {"r": 2, "topk": 3, "save_only_topk_weights": True, **BANK}),
}


def merged(base: Path, adapter: Path, model_class: Any = LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Return what PEFT adds to every weight, in float64."""
    plain = model_class.from_pretrained(base)
    before = {name: x.detach().double().numpy() for name, x in plain.named_parameters()}
    model = PeftModel.from_pretrained(model_class.from_pretrained(base), adapter)
    after = model.double().merge_and_unload()
    return {n: x.detach().double().numpy() - before[n] for n, x in after.named_parameters()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(PROMPT).logits


def relative(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize(("kind", "settings"), VARIANTS.values(), ids=VARIANTS)
def test_update_is_the_one_that_peft_merges(
    kind: str, settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    path = tuned(kind, base, tmp_path, **settings)
    truth = merged(base, path)
    assert detect(path).name == "peft-tuners"
    ours = dense(read_tuner(path, FormatOptions(base=open_base(base))))
    assert len(ours) == len(TARGETS) * 2
    for module, update in ours.items():
        assert relative(update, truth[f"{module}.weight"]) < 2e-7, module
    untouched = {name for name, change in truth.items() if not change.any()}
    assert untouched == truth.keys() - {f"{module}.weight" for module in ours}


@pytest.mark.parametrize(
    "name",
    [
        *("adalora", "loha", "lokr-both", "delora", "gralora", "gralora-hybrid"),
        *("hra", "hra-orthogonal", "miss", "vera", "vblora"),
    ],
)
def test_lora_that_is_written_gives_peft_the_same_logits(
    name: str, base: Path, tmp_path: Path
) -> None:
    kind, settings = VARIANTS[name]
    path = tuned(kind, base, tmp_path / "tuner", **settings)
    want = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), path))
    report = adapterkit.convert(path, tmp_path / "lora", base=base)
    assert report.source_format == "peft-tuners"
    assert report.max_relative_error == 0
    got = logits(
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "lora")
    )
    effect = (want - logits(LlamaForCausalLM.from_pretrained(base))).norm()
    assert effect > 1e-2
    assert (got - want).norm() < 2e-6 * effect


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("AdaLora", {"init_r": 4, "total_step": 10}),
        ("Vera", {"r": 4}),
        ("VBLoRA", {"r": 2, **BANK}),
    ],
    ids=["adalora", "vera", "vblora"],
)
def test_conv1d_weights_are_updated_turned(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    path = tuned(
        kind,
        tmp_path / "base",
        tmp_path / "tuner",
        GPT2LMHeadModel,
        **settings,
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
    )
    truth = merged(tmp_path / "base", path, GPT2LMHeadModel)
    ours = dense(read_tuner(path, FormatOptions(base=open_base(tmp_path / "base"))))
    assert len(ours) == 2
    for module, update in ours.items():
        assert relative(update, truth[f"{module}.weight"].T) < 2e-7, module


def test_pruned_adalora_keeps_the_scale_that_it_was_trained_with(
    base: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    settings = {"init_r": 6, "total_step": 10, "lora_alpha": 5, "target_modules": TARGETS}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), peft.AdaLoraConfig(**settings))
    names = [name for name, _ in model.named_parameters() if "lora_E" in name]
    masks = [[True, False, True, True, False, False], [False] * 6]
    pattern = {
        name.removeprefix("base_model.model."): masks[place % 3 == 2]
        for place, name in enumerate(names)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.peft_config["default"].rank_pattern = pattern
    with warnings.catch_warnings():
        # PEFT takes modules that it pruned to rank 0 for shards that were not gathered.
        warnings.filterwarnings("ignore", ".*have invalid shape", UserWarning)
        model.save_pretrained(tmp_path)
    adapter = read_tuner(tmp_path, FormatOptions())
    with warnings.catch_warnings():
        # AdaLoRA's pattern names tensors, not modules; PEFT applies it all the same.
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
        truth = merged(base, tmp_path)
    ours = dense(adapter)
    assert {pair.rank for pair in adapter.pairs()} == {3}
    assert len(ours) == len(names) - 2
    for module, update in ours.items():
        assert relative(update, truth[f"{module}.weight"]) < 2e-7, module
    assert any("2 modules were pruned to rank 0" in note for note in adapter.provenance.notes)


def test_no_rank_is_larger_than_the_smaller_side(base: Path, tmp_path: Path) -> None:
    adapter = read_tuner(tuned("LoHa", base, tmp_path, r=6, alpha=5), FormatOptions())
    sides = {pair.module: min(pair.shape) for pair in adapter.pairs()}
    assert {pair.module: pair.rank for pair in adapter.pairs()} == sides


def test_trained_parameters_beside_the_factors_are_kept(base: Path, tmp_path: Path) -> None:
    path = tuned("LoHa", base, tmp_path / "tuner", r=2, modules_to_save=["lm_head"])
    adapter = read_tuner(path, FormatOptions())
    stored = load_file(path / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    kept = adapter.tensors[TensorKey("lm_head.weight", Role.FULL)]
    np.testing.assert_array_equal(kept.numpy(), stored.numpy())
    adapterkit.convert(path, tmp_path / "lora")
    want = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), path))
    got = logits(
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "lora")
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_bin_and_leaked_adapter_names_read_the_same(base: Path, tmp_path: Path) -> None:
    path = tuned("LoKr", base, tmp_path, r=2)
    want = dense(read_tuner(path, FormatOptions()))
    stored = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    torch.save(
        {f"module.{name}.default": x for name, x in stored.items()}, path / "adapter_model.bin"
    )
    got = dense(read_tuner(path, FormatOptions()))
    assert got.keys() == want.keys()
    for module, update in got.items():
        np.testing.assert_array_equal(update, want[module])


@pytest.mark.parametrize("kind", ["Miss", "Vera"])
def test_files_without_module_sizes_ask_for_the_base(kind: str, base: Path, tmp_path: Path) -> None:
    path = tuned(kind, base, tmp_path, r=4)
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        read_tuner(path, FormatOptions())
    bare = dense(read_tuner(path, FormatOptions(base=open_base(base / "config.json"))))
    full = dense(read_tuner(path, FormatOptions(base=open_base(base))))
    assert bare.keys() == full.keys()
    for module, update in bare.items():
        np.testing.assert_array_equal(update, full[module])


RANKS = {
    "adalora": 2,
    "delora": 2,
    "gralora": 4,
    "hra": 2,
    "loha": 4,
    "lokr": 2,
    "miss": 2,
    "vblora": 2,
    "vera": 2,
}


def test_fixtures_are_read_with_nothing_but_a_base_beside_them() -> None:
    known = open_base(FIXTURES / "tuners" / "base")
    assert {kind.upper() for kind in RANKS} == RULES.keys()
    for name, rank in RANKS.items():
        adapter = read_tuner(FIXTURES / "tuners" / name, FormatOptions(base=known))
        (pair,) = adapter.pairs()
        assert (pair.module, pair.rank) == ("model.layers.0.self_attn.q_proj", rank), name
        assert pair.shape == (8, 12)
        assert dense(adapter)[pair.module].any()


def test_fixtures_of_whole_parameters_are_read() -> None:
    known = open_base(FIXTURES / "tuners" / "base")
    found = {
        name.lower(): next(
            iter(read_tuner(FIXTURES / "tuners" / name.lower(), FormatOptions(base=known)).tensors)
        )
        for name in WHOLE
        if name != "BEFT"
    }
    assert found == {
        "ia3": TensorKey("model.layers.0.self_attn.q_proj.weight", Role.FULL),
        "ln_tuning": TensorKey("model.norm.weight", Role.FULL),
        "trainable_tokens": TensorKey("model.embed_tokens", Role.TOKEN_ROWS),
    }


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_and_peft_mean_the_same_by_the_same_tensors(kind: str) -> None:
    known = open_base(FIXTURES / "tuners" / "base" / "config.json")
    theirs = read_lycoris(
        FIXTURES / "tuners" / "lycoris" / f"{kind}.safetensors", FormatOptions(base=known)
    )
    ours = read_tuner(FIXTURES / "tuners" / kind, FormatOptions())
    assert dense(theirs).keys() == dense(ours).keys()
    for module, update in dense(ours).items():
        np.testing.assert_array_equal(dense(theirs)[module], update)
