"""Merged into a Hugging Face base, adapters give the logits that PEFT gives with them active."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoint_bases import (
    EFFECT,
    EQUAL,
    LINEAR,
    bf16_base,
    fused_base,
    hub,
    loaded,
    lora,
    trained,
)
from checkpoint_merges import dense, edited, load_file
from engine import BaseFixture, family_row, logprobs, make_base, max_kl, prompts_for

from adapterkit import merge_into
from adapterkit.conversion import convert
from adapterkit.errors import (
    UnsupportedError,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseFixture]:
    names = ("llama", "llama-tied", "gpt2", "mixtral", "qwen2")
    return {name: make_base(family_row(name), tmp_path_factory.mktemp(name)) for name in names}


SETTINGS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "plain": ("llama", None, {"target_modules": LINEAR}),
    "rslora-patterns": (
        "llama",
        None,
        {
            "target_modules": LINEAR,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "dora": ("llama", None, {"target_modules": LINEAR, "use_dora": True}),
    "embedding": ("llama", None, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding-dora": (
        "llama",
        None,
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ),
    "saved": ("llama", None, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved-norms": ("llama", None, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "token-rows": (
        "llama",
        None,
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 300, 7]},
    ),
    "bias": ("qwen2", None, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "trained-bias": ("qwen2", None, {"target_modules": ["q_proj"], "bias": "all"}),
    "conv1d": ("gpt2", None, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d-dora": ("gpt2", None, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "conv1d-bias": ("gpt2", None, {"target_modules": ["c_attn"], "lora_bias": True}),
    "experts": (
        "mixtral",
        None,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "tied-untied": ("llama-tied", "untie", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-output": ("llama-tied", "untie", {"target_modules": ["lm_head", "q_proj"]}),
    "tied-token-rows": (
        "llama-tied",
        "shared",
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 300, 7]},
    ),
    "tied-saved": (
        "llama-tied",
        "shared",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_peft(name: str, bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    family, tied, settings = SETTINGS[name]
    base = bases[family]
    tuned = trained(base, tmp_path / "adapter", **settings)
    report = merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged", tied=tied)
    prompts = prompts_for(base)[-8:]
    wanted = logprobs(tuned, prompts)
    assert max_kl(logprobs(base.model, prompts), wanted) > EFFECT
    merged = loaded(tmp_path / "merged")
    assert max_kl(wanted, logprobs(merged, prompts)) < EQUAL
    assert report.min_survival == pytest.approx(1, abs=1e-5)


def test_several_dora_adapters_compose_as_peft_composes_them(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    for seed, name in ((1, "a"), (2, "b")):
        trained(base, tmp_path / name, seed=seed, target_modules=["q_proj"], use_dora=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = lora.PeftModel.from_pretrained(loaded(base.hf), tmp_path / "a", adapter_name="a")
        model.load_adapter(tmp_path / "b", adapter_name="b")
    model.base_model.set_adapter(["a", "b"])
    prompts = prompts_for(base)[-6:]
    wanted = logprobs(model.eval(), prompts)
    for order, bound in ((["a", "b"], EQUAL), (["b", "a"], None)):
        target = tmp_path / "-".join(order)
        report = merge_into([tmp_path / name for name in order], base.hf, target)
        assert any("order counts" in note for note in report.notes)
        apart = max_kl(wanted, logprobs(loaded(target), prompts))
        assert apart < bound if bound else apart > 10 * EQUAL


def bf16_units(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the last place of float64 values in bfloat16, which has 8 bits of mantissa."""
    return np.exp2(np.frexp(values)[1] - 8)


def test_sixteen_bits_are_rounded_once_and_rightly(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bf16_base(bases["llama"], tmp_path / "base")
    adapters = {tmp_path / "a": 0.7, tmp_path / "b": -1.3}
    for seed, adapter in enumerate(adapters):
        trained(bases["llama"], adapter, seed=seed, target_modules=LINEAR)
    merge_into(list(adapters), base, tmp_path / "merged", weights=list(adapters.values()))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    wrong = seen = 0
    sizes = dense(base, adapters, sizes=True)
    for name, exact in dense(base, adapters).items():
        assert merged[name].dtype == torch.bfloat16
        unit = bf16_units(exact)
        missed = merged[name].double().numpy() != np.rint(exact / unit) * unit
        # A sum in float32 may fall on the other side of a tie; nothing else may differ.
        tie = (np.floor(exact / unit) + 0.5) * unit
        assert (np.abs(exact - tie) <= 2**-23 * sizes[name])[missed].all()
        wrong, seen = wrong + int(missed.sum()), seen + missed.size
    assert seen > 30_000
    assert wrong < seen / 2**12


def test_sixteen_bits_are_those_of_peft_s_own_merge(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    """PEFT adds a float32 adapter to 16-bit weights with one rounding too."""
    base = bf16_base(bases["llama"], tmp_path / "base")
    trained(bases["llama"], tmp_path / "adapter", target_modules=LINEAR, use_rslora=True)
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged")
    model = hub.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        theirs = lora.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == wanted.keys()
    bits = {name: (ours[name].view(torch.int16), wanted[name].view(torch.int16)) for name in ours}
    apart = {name: (mine - peer).abs() for name, (mine, peer) in bits.items()}
    # Two sums in float32 may fall on either side of a tie, which is one unit.
    assert max(int(each.max()) for each in apart.values()) <= 1
    assert sum(int(each.sum()) for each in apart.values()) < 2**-12 * sum(
        each.numel() for each in apart.values()
    )


def test_float32_is_the_float64_sum_rounded_once(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"].hf
    adapters = {tmp_path / "a": 1.0, tmp_path / "b": 0.3}
    for seed, adapter in enumerate(adapters):
        trained(bases["llama"], adapter, seed=seed, target_modules=LINEAR)
    merge_into(list(adapters), base, tmp_path / "merged", weights=[1.0, 0.3])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, exact in dense(base, adapters).items():
        assert np.array_equal(merged[name].numpy(), exact.astype(np.float32)), name


def test_files_are_the_base_s_but_for_the_changed_bytes(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bf16_base(bases["llama"], tmp_path / "base", max_shard_size="100KB")
    (base / "tokenizer.json").write_text("{}")
    (base / "extra").mkdir()
    (base / "extra" / "notes.txt").write_text("kept")
    (base / "pytorch_model.bin").write_bytes(b"stale")
    trained(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    report = merge_into([tmp_path / "adapter"], base, tmp_path / "merged", proof=False)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    expected = {*shards, "tokenizer.json", "extra/notes.txt", "config.json"}
    expected |= {"generation_config.json", "model.safetensors.index.json"}
    found = {str(p.relative_to(tmp_path / "merged")) for p in (tmp_path / "merged").rglob("*.*")}
    assert found == expected
    assert report.notes == ("pytorch_model.bin is not copied: it holds the unmerged weights",)
    changed: set[str] = set()
    for name in sorted(expected):
        before, after = (base / name).read_bytes(), (tmp_path / "merged" / name).read_bytes()
        if name not in shards:
            assert before == after
            continue
        size = int.from_bytes(before[:8], "little")
        assert before[: 8 + size] == after[: 8 + size]
        old, new = load_file(base / name), load_file(tmp_path / "merged" / name)
        changed |= {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {tensor.tensor for tensor in report.tensors}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert report.untouched == len(bases["llama"].model.state_dict()) - 2


def test_dtype_converts_the_whole_model(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    base = bf16_base(bases["llama"], tmp_path / "base", max_shard_size="100KB")
    trained(bases["llama"], tmp_path / "adapter", target_modules=LINEAR)
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", dtype="f32")
    exact = dense(base, {tmp_path / "adapter": 1.0})
    kept: dict[str, Any] = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        kept |= load_file(file)
    for name, tensor in kept.items():
        assert tensor.dtype == torch.float32
        if name in exact:
            np.testing.assert_allclose(tensor.numpy(), exact[name], rtol=1e-4, atol=1e-6)
    config = hub.AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.dtype == torch.float32
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in kept.values())


def test_a_narrower_type_that_cannot_hold_the_base_is_refused(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    """Of a tensor that no adapter changes, too; what was infinite before is only copied."""
    trained(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    name = "model.layers.1.mlp.up_proj.weight"
    for value, fits in ((1e5, False), (float("inf"), True), (6e4, True)):

        def large(stored: dict[str, Any], value: float = value) -> dict[str, Any]:
            stored[name][3, 5] = value
            return stored

        base = edited(bases["llama"].hf, tmp_path / f"base-{value}", large)
        out = tmp_path / f"out-{value}"
        if fits:
            merge_into([tmp_path / "adapter"], base, out, dtype="f16")
            assert load_file(out / "model.safetensors")[name][3, 5] == torch.tensor(value).half()
        else:
            with pytest.raises(UnsupportedError, match=f"{name}: a value does not fit F16"):
                merge_into([tmp_path / "adapter"], base, out, dtype="f16")
            assert not out.exists()


def test_vocabulary_that_grew_is_stored_with_its_new_size(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    tuned = loaded(base.hf)
    tuned.resize_token_embeddings(520, mean_resizing=False)
    config = lora.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        tuned = lora.get_peft_model(tuned, config).eval()
        tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    assert merged.config.vocab_size == 520
    prompts = [[5, 6, 519], [515]]
    assert max_kl(logprobs(tuned, prompts), logprobs(merged, prompts)) < EQUAL


def test_an_output_that_grew_alone_is_not_untied_from_an_embedding_that_did_not(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    trained(bases["llama-tied"], tmp_path / "adapter", modules_to_save=["lm_head"])

    def more_rows(stored: dict[str, Any]) -> dict[str, Any]:
        return {n: torch.cat([t, t[:8]]) if "lm_head" in n else t for n, t in stored.items()}

    adapter = edited(tmp_path / "adapter", tmp_path / "grown", more_rows)
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight 520"):
        merge_into([adapter], bases["llama-tied"].hf, tmp_path / "merged", tied="untie")
    assert not (tmp_path / "merged").exists()


def test_experts_meet_in_every_spelling(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    base = bases["mixtral"]
    stored = load_file(base.hf / "model.safetensors")
    assert any(".experts.0.w1." in name for name in stored)
    fused = fused_base(base, tmp_path / "fused-base")
    _, _, settings = SETTINGS["experts"]
    tuned = trained(base, tmp_path / "fused", **settings)
    convert(tmp_path / "fused", tmp_path / "single", base=base.hf, moe_layout="experts", to="peft")
    prompts = prompts_for(base)[-6:]
    wanted = logprobs(tuned, prompts)
    for adapter in ("fused", "single"):
        for place, into in enumerate((base.hf, fused)):
            target = tmp_path / f"{adapter}-{place}"
            merge_into([tmp_path / adapter], into, target)
            assert max_kl(wanted, logprobs(loaded(target), prompts)) < EQUAL


def test_an_initialisation_that_changed_the_base_is_taken_back(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    tuned = trained(
        base, tmp_path / "adapter", target_modules=["q_proj"], init_lora_weights="pissa"
    )
    report = merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged")
    prompts = prompts_for(base)[-6:]
    apart = max_kl(logprobs(tuned, prompts), logprobs(loaded(tmp_path / "merged"), prompts))
    assert apart < EQUAL
    assert any("taken back" in note for note in report.notes)
