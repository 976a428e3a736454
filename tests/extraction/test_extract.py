"""What lies between two checkpoints: the adapter that was merged in, as PEFT and we merge it."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoint_bases import (
    EFFECT,
    LINEAR,
    bf16_base,
    fused_base,
    loaded,
    lora,
    tensors,
    trained,
)
from engine import BaseFixture, family_row, logprobs, make_base, max_kl, prompts_for
from extraction_settings import SETTINGS, ranks
from safetensors.torch import load_file

from adapterkit import diff, extract, inspect, merge_into, read
from adapterkit.errors import AdapterKitError
from adapterkit.extraction import assembly
from adapterkit.factors import turned
from adapterkit.model import AdapterTensorSet

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

# Between two ways to compute the same in float32, in nats; factors of 1e-7 move it a little more.
EQUAL = 1e-8


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseFixture]:
    names = ("llama", "llama-tied", "gpt2", "mixtral", "qwen2")
    return {name: make_base(family_row(name), tmp_path_factory.mktemp(name)) for name in names}


def with_adapter(base: Path, adapter: Path) -> Any:
    """Load an adapter in PEFT; a key that is missing or unexpected is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")
        return lora.PeftModel.from_pretrained(loaded(base), adapter).eval()


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_that_was_merged_comes_back(
    name: str, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    family, settings = SETTINGS[name]
    base = bases[family]
    trained(base, tmp_path / "adapter", **settings)
    merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged")
    report = extract(base.hf, tmp_path / "merged", tmp_path / "back")
    assert ranks(report) == {4}
    assert report.left_over == report.warnings == ()
    assert 0 < report.max_relative_error < 1e-6
    found = diff(tmp_path / "adapter", tmp_path / "back", base=base.hf)
    assert found.equal
    assert found.max_relative_error < 1e-6
    if family != "mixtral":  # where the matrices of all experts count as one
        stored = load_file(base.hf / "model.safetensors")
        assert report.equal == len(stored) - len(report.modules)


@pytest.mark.parametrize("name", SETTINGS)
def test_of_peft_s_own_merge_peft_gets_the_logits_back(
    name: str, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    family, settings = SETTINGS[name]
    base = bases[family]
    tuned = trained(base, tmp_path / "adapter", **settings).merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="100KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    report = extract(base.hf, tmp_path / "tuned", tmp_path / "back")
    assert ranks(report) == {4}
    prompts = prompts_for(base)[-8:]
    wanted = logprobs(tuned, prompts)
    assert max_kl(logprobs(base.model, prompts), wanted) > EFFECT
    assert max_kl(wanted, logprobs(with_adapter(base.hf, tmp_path / "back"), prompts)) < EQUAL
    assert diff(tmp_path / "adapter", tmp_path / "back", base=base.hf).max_relative_error < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_add_their_rounding_and_nothing_else(
    dtype: Any, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    loaded(base.hf).to(dtype).save_pretrained(tmp_path / "base")
    trained(base, tmp_path / "adapter", target_modules=["q_proj", "gate_proj"])
    merge_into([tmp_path / "adapter"], tmp_path / "base", tmp_path / "merged", weights=[0.1])
    report = extract(tmp_path / "base", tmp_path / "merged", tmp_path / "back")
    assert ranks(report) == {4}
    assert inspect(tmp_path / "back").dtypes.keys() == {
        "BF16" if dtype is torch.bfloat16 else "F16"
    }
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    exact = {pair.module: pair for pair in read(tmp_path / "adapter").pairs()}
    back = {pair.module: pair for pair in read(tmp_path / "back").pairs()}
    for module in report.modules:
        name = module.tensor
        apart = (after[name].double() - before[name].double()).numpy()
        pair = exact[module.module]
        update = 0.1 * pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy()
        noise = float(np.linalg.norm(apart - update))
        assert module.norm == pytest.approx(float(np.linalg.norm(apart)), rel=1e-6)
        assert module.rounding == pytest.approx(noise / module.norm, rel=0.1)
        found = back[module.module]
        product = found.b.numpy().astype(float) @ found.a.numpy().astype(float)
        left = float(np.linalg.norm(apart - found.scale * product))
        assert module.relative_error == pytest.approx(left / module.norm, rel=1e-5)
        # Rank 4 takes up some noise, and the rest of it is what is left.
        assert module.relative_error < noise / module.norm
        assert module.explained is not None
        assert module.explained > 0.9


def test_the_base_may_be_stored_wider_and_in_other_shards(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    loaded(base.hf).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged", dtype="bf16")
    report = extract(tmp_path / "base", tmp_path / "merged", tmp_path / "back")
    assert [module.rank for module in report.modules] == [4, 4]
    assert {module.tensor for module in report.modules} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    }
    rounded = [left for left in report.left_over if "rounding" in left.reason]
    assert len(rounded) + sum("norm" in left.reason for left in report.left_over) == len(
        report.left_over
    )
    assert any("differ by no more than rounding" in note for note in report.notes)


@pytest.mark.parametrize("fused", ["base", "tuned"])
def test_experts_meet_in_every_spelling(
    fused: str, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["mixtral"]
    _, settings = SETTINGS["experts"]
    tuned = trained(base, tmp_path / "adapter", **settings).merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")
    together = fused_base(base, tmp_path / "fused")
    if fused == "tuned":
        state = {name: x.contiguous() for name, x in tuned.state_dict().items()}
        assert any(name.endswith("mlp.experts.gate_up_proj") for name in state)
        tensors.save_file(
            state, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"}
        )
    report = extract(
        together if fused == "base" else base.hf, tmp_path / "tuned", tmp_path / "back"
    )
    assert report.left_over == ()
    prompts = prompts_for(base)[-6:]
    back = with_adapter(base.hf, tmp_path / "back")
    assert max_kl(logprobs(tuned, prompts), logprobs(back, prompts)) < EQUAL
    found = diff(tmp_path / "adapter", tmp_path / "back", base=base.hf)
    assert found.max_relative_error < 1e-6


def test_experts_one_by_one_on_request(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    base = bases["mixtral"]
    _, settings = SETTINGS["experts"]
    trained(base, tmp_path / "adapter", **settings)
    merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged")
    extract(base.hf, tmp_path / "merged", tmp_path / "back", moe_layout="experts")
    names = {pair.module for pair in read(tmp_path / "back").pairs()}
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in names


def changed(base: BaseFixture, folder: Path, change: Any) -> Any:
    """Save a model some of whose parameters were changed in place; return it."""
    model = loaded(base.hf)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(change(name, parameter, generator))
    model.save_pretrained(folder)
    return model


def low_rank(parameter: Any, generator: Any, rank: int = 3) -> Any:
    left = torch.randn(parameter.shape[0], rank, generator=generator)
    return 0.03 * left @ torch.randn(rank, parameter.shape[1], generator=generator)


def test_what_no_factors_hold_is_named_or_saved_whole(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["qwen2"]

    def change(name: str, parameter: Any, generator: Any) -> Any:
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            return low_rank(parameter, generator)
        moved = parameter.ndim == 1 and "layers.1" in name
        return 0.5 * torch.randn(parameter.shape, generator=generator) if moved else 0.0

    tuned = changed(base, tmp_path / "tuned", change)
    report = extract(base.hf, tmp_path / "tuned", tmp_path / "rest")
    assert ranks(report) == {3}
    stem = "model.layers.1"
    expected = {f"{stem}.self_attn.{x}_proj.bias": "is a bias" for x in "qkv"}
    expected |= {f"{stem}.{x}_layernorm.weight": "is a norm" for x in ("input", "post_attention")}
    assert {left.tensor: left.reason for left in report.left_over} == expected
    before = load_file(base.hf / "model.safetensors")
    after = load_file(tmp_path / "tuned" / "model.safetensors")
    for left in report.left_over:
        ratio = (after[left.tensor] - before[left.tensor]).norm() / before[left.tensor].norm()
        assert left.relative_norm == pytest.approx(float(ratio), rel=1e-5)
        assert not left.saved
    (warning,) = report.warnings
    assert "5 tensors left over" in warning
    prompts = prompts_for(base)[-6:]
    wanted = logprobs(tuned, prompts)
    partly = logprobs(with_adapter(base.hf, tmp_path / "rest"), prompts)
    assert max_kl(wanted, partly) > EFFECT
    report = extract(base.hf, tmp_path / "tuned", tmp_path / "whole", save_rest=True)
    assert all(left.saved for left in report.left_over)
    assert report.warnings == ()
    whole = logprobs(with_adapter(base.hf, tmp_path / "whole"), prompts)
    assert max_kl(wanted, whole) < EQUAL


def test_a_shared_table_is_extracted_for_both_of_its_uses(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama-tied"]

    def change(name: str, parameter: Any, generator: Any) -> Any:
        return low_rank(parameter, generator) if "embed" in name or "q_proj" in name else 0.0

    tuned = changed(base, tmp_path / "tuned", change)
    report = extract(base.hf, tmp_path / "tuned", tmp_path / "back")
    assert [
        pair.module for pair in read(tmp_path / "back").pairs() if "layers" not in pair.module
    ] == [
        "lm_head",
        "model.embed_tokens",
    ]
    assert any("share one table" in note for note in report.notes)
    prompts = prompts_for(base)[-6:]
    back = logprobs(with_adapter(base.hf, tmp_path / "back"), prompts)
    assert max_kl(logprobs(tuned, prompts), back) < EQUAL
    # llama.cpp has no place for either, and says so for this table alone.
    report = extract(base.hf, tmp_path / "tuned", tmp_path / "back.gguf")
    (left,) = report.left_over
    assert left.tensor == "model.embed_tokens.weight"
    assert "shares this table" in left.reason
    assert len(report.modules) == 2


@pytest.mark.parametrize("stored", ["base", "tuned"])
def test_a_stored_copy_of_a_shared_table_is_the_table(
    stored: str, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama-tied"]
    changed(base, tmp_path / "tuned", lambda n, p, g: low_rank(p, g) if "q_proj" in n else 0.0)
    shutil.copytree(base.hf, tmp_path / "base")
    file = tmp_path / stored / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    tensors.save_file(state, file, metadata={"format": "pt"})
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "back")
    assert {module.module.rpartition(".")[2] for module in report.modules} == {"q_proj"}
    assert report.left_over == ()


@pytest.mark.parametrize("own", ["base", "tuned"])
def test_an_output_of_its_own_on_one_side_only(
    own: str, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama-tied"]
    shutil.copytree(base.hf, tmp_path / "base")
    shutil.copytree(base.hf, tmp_path / "tuned")
    file = tmp_path / own / "model.safetensors"
    state = load_file(file)
    generator = torch.Generator().manual_seed(3)
    table = state["model.embed_tokens.weight"]
    update = low_rank(table, generator) / 10
    state["lm_head.weight"] = table + update
    tensors.save_file(state, file, metadata={"format": "pt"})
    config = tmp_path / own / "config.json"
    text = config.read_text()
    assert '"tie_word_embeddings": true' in text
    config.write_text(text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "back")
    (module,) = report.modules
    assert (module.module, module.rank) == ("lm_head", 3)
    (pair,) = read(tmp_path / "back").pairs()
    sign = 1 if own == "tuned" else -1
    np.testing.assert_allclose(
        sign * pair.b.numpy() @ pair.a.numpy(), update.numpy(), rtol=0, atol=1e-6
    )


def test_a_vocabulary_that_grew_is_left_over_or_saved(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    tuned = loaded(base.hf)
    tuned.resize_token_embeddings(520, mean_resizing=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        weight = tuned.model.layers[0].self_attn.q_proj.weight
        weight.add_(low_rank(weight, generator))
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(base.hf, tmp_path / "tuned", tmp_path / "back")
    assert {left.tensor: left.reason for left in report.left_over} == dict.fromkeys(
        ("lm_head.weight", "model.embed_tokens.weight"),
        "has 520 rows, the base 512: another vocabulary",
    )
    assert len(report.modules) == 1
    extract(base.hf, tmp_path / "tuned", tmp_path / "whole", save_rest=True)
    merge_into([tmp_path / "whole"], base.hf, tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    prompts = [[5, 6, 519], [515]]
    assert max_kl(logprobs(tuned, prompts), logprobs(merged, prompts)) < EQUAL


def test_dora_is_no_low_rank_and_its_error_is_told(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    tuned = trained(base, tmp_path / "adapter", target_modules=["o_proj"], use_dora=True)
    merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged")
    report = extract(base.hf, tmp_path / "merged", tmp_path / "four", rank=4)
    assert ranks(report) == {4}
    assert report.max_relative_error > 0.3
    assert any("raise --rank" in warning for warning in report.warnings)
    report = extract(base.hf, tmp_path / "merged", tmp_path / "all", tol=1e-5)
    assert min(ranks(report)) > 16
    prompts = prompts_for(base)[-6:]
    back = with_adapter(base.hf, tmp_path / "all")
    assert max_kl(logprobs(tuned, prompts), logprobs(back, prompts)) < EQUAL


def test_headless_spelling_is_that_of_the_loaded_model(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["gpt2"]
    trained(base, tmp_path / "adapter", target_modules=["c_attn"])
    merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged")
    bare = tmp_path / "merged" / "model.safetensors"
    state = {n.removeprefix("transformer."): x for n, x in load_file(bare).items()}
    tensors.save_file(state, bare, metadata={"format": "pt"})
    report = extract(base.hf, tmp_path / "merged", tmp_path / "back")
    assert [module.module for module in report.modules] == [
        f"transformer.h.{layer}.attn.c_attn" for layer in (0, 1)
    ]
    assert diff(tmp_path / "adapter", tmp_path / "back", base=base.hf).max_relative_error < 1e-6


def test_nothing_depends_on_threads(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    base = bases["llama"]
    trained(base, tmp_path / "adapter", target_modules=LINEAR)
    source = bf16_base(base, tmp_path / "base")
    merge_into([tmp_path / "adapter"], source, tmp_path / "merged")
    for jobs in (1, 3):
        extract(source, tmp_path / "merged", tmp_path / str(jobs), jobs=jobs)
    one, three = (
        (tmp_path / jobs / "adapter_model.safetensors").read_bytes() for jobs in ("1", "3")
    )
    assert one == three


@pytest.mark.parametrize("fault", ["exchanged", "turned", "unknown"])
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_what_is_written_is_laid_on_the_weights_that_it_names(
    fault: str,
    kind: str,
    bases: dict[str, BaseFixture],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = bases["llama"]
    trained(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    original = base.hf if kind == "hf" else base.gguf
    tuned = tmp_path / ("merged" if kind == "hf" else "merged.gguf")
    merge_into([tmp_path / "adapter"], original, tuned)
    sound = assembly.assembled

    def faulty(*arguments: Any) -> Any:
        adapter, modules = sound(*arguments)
        pairs = {pair.module: pair for pair in adapter.pairs()}
        q, o = (f"model.layers.0.self_attn.{name}_proj" for name in "qo")
        wrong = (
            pairs
            | {
                "exchanged": {q: replace(pairs[o], module=q), o: replace(pairs[q], module=o)},
                "turned": {o: replace(pairs[o], a=turned(pairs[o].b), b=turned(pairs[o].a))},
                "unknown": {o: replace(pairs[o], module=o.replace("model.", "model.text."))},
            }[fault]
        )
        return AdapterTensorSet.of(wrong.values(), {}, base=adapter.base), modules

    monkeypatch.setattr("adapterkit.extraction.extraction.assembled", faulty)
    with pytest.raises(AdapterKitError, match=r"laid on it|is no module|no table"):
        extract(original, tuned, tmp_path / "back")
    assert not (tmp_path / "back").exists()
