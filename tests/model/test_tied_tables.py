"""One update of tied tables, stored under two names: it counts once in every command."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tables_oracle import GROWN, ROWS, assert_same, load_model, reloaded, tuned, write_base

from adapterkit import audit, compress_file, merge_into, validate
from adapterkit.comparison import diff
from adapterkit.conversion import convert
from adapterkit.errors import UnsupportedError
from adapterkit.files import read
from adapterkit.merging.files import merge_files
from adapterkit.model import spelled_out

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"
TABLE, OUTPUT = "model.embed_tokens", "lm_head"
QUERY: dict[str, Any] = {"target_modules": ["q_proj"]}
ENSURED: dict[str, Any] = {
    "target_modules": ["embed_tokens", "q_proj"],
    "ensure_weight_tying": True,
}
# What is trained of tied tables; PEFT's live model is right without a choice in all.
ONCE: dict[str, dict[str, Any]] = {
    "embedding": ENSURED,
    "output": {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "pattern": {**ENSURED, "alpha_pattern": {"embed_tokens": 3, "lm_head": 3}},
    "expression": {"target_modules": r".*(q_proj|embed_tokens)", "ensure_weight_tying": True},
    "saved": {**QUERY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved-output": {**QUERY, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "rows": {**QUERY, "trainable_token_indices": [5, 9], "ensure_weight_tying": True},
    "rows-of-both": {
        **QUERY,
        "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]},
        "ensure_weight_tying": True,
    },
    "rows-unasked": {**QUERY, "trainable_token_indices": [5, 9]},
}
FAMILIES = ("llama", "qwen2")


def test_the_reader_holds_one_update(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    tuned(base, tmp_path / "adapter", **ENSURED)
    adapter = read(tmp_path / "adapter")
    assert dict(adapter.tied) == {TABLE: (OUTPUT,)}
    assert [pair.module for pair in adapter.pairs() if pair.module in {TABLE, OUTPUT}] == [TABLE]
    whole = {pair.module: pair for pair in spelled_out(adapter).pairs()}
    held = load_file(tmp_path / "adapter" / WEIGHTS)
    for leaf, factor in (("lora_A", whole[OUTPUT].a), ("lora_B", whole[OUTPUT].b)):
        stored = held[f"base_model.model.lm_head.{leaf}.weight"].numpy()
        np.testing.assert_array_equal(factor.numpy(), stored)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", [None, "shared", "untie"])
@pytest.mark.parametrize("name", ONCE)
def test_a_tied_update_is_merged_once(
    name: str, choice: str | None, family: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", tied=True, family=family)
    live = tuned(base, tmp_path / "adapter", **ONCE[name])
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", tied=choice)
    assert_same(live, load_model(tmp_path / "merged"), ROWS)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (choice != "untie")
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) is (
        choice == "untie"
    )


def test_an_index_counts_the_parameters_that_are_there(tmp_path: Path) -> None:
    write_base(tmp_path / "whole", tied=True)
    base = tmp_path / "base"
    load_model(tmp_path / "whole").save_pretrained(base, max_shard_size="20KB")
    tuned(base, tmp_path / "adapter", **ONCE[next(iter(ONCE))])
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", tied="untie")
    load_model(tmp_path / "merged").save_pretrained(tmp_path / "again", max_shard_size="20KB")
    found, wanted = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())["metadata"]
        for name in ("merged", "again")
    )
    assert found["total_parameters"] == wanted["total_parameters"]


def test_a_stored_copy_of_the_table_follows(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, base / "model.safetensors", {"format": "pt"})
    live = tuned(base, tmp_path / "adapter", **ENSURED)
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert_same(live, load_model(tmp_path / "merged"), ROWS)


def test_a_stored_copy_of_the_table_grows_with_it(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    live = tuned(base, tmp_path / "adapter", rows=GROWN, **ENSURED)
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, base / "model.safetensors", {"format": "pt"})
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert_same(live, load_model(tmp_path / "merged"), GROWN)


def test_norms_that_are_alike_are_no_tied_tables(tmp_path: Path) -> None:
    """Saved whole and never moved, all of them hold ones; each is still its own."""
    base = write_base(tmp_path / "base", tied=True)
    norms = ["input_layernorm", "post_attention_layernorm"]
    tuned(base, tmp_path / "adapter", **ENSURED | {"modules_to_save": norms})
    held = load_file(tmp_path / "adapter" / WEIGHTS)
    for name in held:
        if "layernorm" in name:
            held[name].fill_(1.5)
    save_file(held, tmp_path / "adapter" / WEIGHTS)
    assert set(read(tmp_path / "adapter").tied) <= {TABLE}
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", tied="untie")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for norm in norms:
        assert (merged[f"model.layers.0.{norm}.weight"] == 1.5).all()


def test_an_untied_base_gets_it_in_both_tables(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    live = tuned(base, tmp_path / "adapter", **ENSURED)
    model = load_model(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    merge_into([tmp_path / "adapter"], tmp_path / "untied", tmp_path / "merged")
    assert_same(live, load_model(tmp_path / "merged"), ROWS)


TWICE: dict[str, dict[str, Any]] = {
    "factors": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved": {**QUERY, "modules_to_save": ["embed_tokens"], "save_embedding_layers": True},
    "rows": {**QUERY, "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 7]}},
}


@pytest.mark.parametrize("name", TWICE)
def test_two_updates_of_one_table_take_two_tables(name: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    live = tuned(base, tmp_path / "adapter", **TWICE[name])
    for choice, message in ((None, "--tied untie"), ("shared", "cannot share a table")):
        with pytest.raises(UnsupportedError, match=message):
            merge_into([tmp_path / "adapter"], base, tmp_path / "merged", tied=choice)
        assert not (tmp_path / "merged").exists()
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", tied="untie")
    assert_same(live, load_model(tmp_path / "merged"), ROWS)


def test_one_update_under_two_names_counts_once_without_the_setting(tmp_path: Path) -> None:
    """An adapter of another program, or of an older PEFT, whose two names say the same."""
    base = write_base(tmp_path / "base", tied=True)
    live = tuned(base, tmp_path / "adapter", **ENSURED)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = ["embed_tokens", "lm_head", "q_proj"]
    file.write_text(json.dumps(config | {"ensure_weight_tying": False}))
    assert not read(tmp_path / "adapter").tied
    for choice in (None, "shared", "untie"):
        merge_into([tmp_path / "adapter"], base, tmp_path / f"merged-{choice}", tied=choice)
        assert_same(live, load_model(tmp_path / f"merged-{choice}"), ROWS)


def test_what_is_not_the_same_is_not_tied(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    tuned(base, tmp_path / "adapter", **ENSURED)
    held = load_file(tmp_path / "adapter" / WEIGHTS)
    held["base_model.model.lm_head.lora_A.weight"][0, 0] += 1
    save_file(held, tmp_path / "adapter" / WEIGHTS)
    assert not read(tmp_path / "adapter").tied
    with pytest.raises(UnsupportedError, match="cannot share a table"):
        merge_into([tmp_path / "adapter"], base, tmp_path / "merged", tied="shared")


@pytest.mark.parametrize("name", ONCE)
def test_peft_gets_back_what_it_saved(name: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    live = tuned(base, tmp_path / "adapter", **ONCE[name])
    convert(tmp_path / "adapter", tmp_path / "again", base=base)
    before, after = (load_file(tmp_path / x / WEIGHTS) for x in ("adapter", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert_same(live, reloaded(base, tmp_path / "again"), ROWS)
    assert diff(tmp_path / "adapter", tmp_path / "again").equal


@pytest.mark.parametrize(
    "wishes",
    [{"rank": 2}, {"tol": 0.2}, {"policy": "sv_fro", "threshold": 0.9}, {"budget": 600}],
    ids=str,
)
def test_compressed_it_stays_one_update(wishes: dict[str, Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    tuned(base, tmp_path / "adapter", **ENSURED)
    compress_file(tmp_path / "adapter", tmp_path / "small", **wishes)
    small = read(tmp_path / "small")
    assert dict(small.tied) == {TABLE: (OUTPUT,)}
    merge_into([tmp_path / "small"], base, tmp_path / "merged")
    assert_same(reloaded(base, tmp_path / "small"), load_model(tmp_path / "merged"), ROWS)


def test_merged_with_its_like_it_stays_one_update(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    for name, settings in {"one": ENSURED, "other": ENSURED, "plain": QUERY}.items():
        tuned(base, tmp_path / name, **settings)
    sources = [tmp_path / name for name in ("one", "other", "plain")]
    merge_files(sources, tmp_path / "sum", weights=[0.5, 0.7, 0.2])
    assert dict(read(tmp_path / "sum").tied) == {TABLE: (OUTPUT,)}
    merge_into([tmp_path / "sum"], base, tmp_path / "merged")
    assert_same(reloaded(base, tmp_path / "sum"), load_model(tmp_path / "merged"), ROWS)
    merge_into(sources, base, tmp_path / "at-once")
    merge_files(sources, tmp_path / "whole")
    merge_into([tmp_path / "whole"], base, tmp_path / "one-by-one")
    assert_same(load_model(tmp_path / "at-once"), load_model(tmp_path / "one-by-one"), ROWS)


def test_merged_with_two_updates_both_names_stand_for_themselves(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    tuned(base, tmp_path / "one", **ENSURED)
    tuned(base, tmp_path / "other", target_modules=["embed_tokens", "lm_head", "q_proj"])
    sources = [tmp_path / "one", tmp_path / "other"]
    merge_files(sources, tmp_path / "sum")
    assert not read(tmp_path / "sum").tied
    merge_into([tmp_path / "sum"], base, tmp_path / "merged", tied="untie")
    merge_into(sources, base, tmp_path / "at-once", tied="untie")
    assert_same(load_model(tmp_path / "at-once"), load_model(tmp_path / "merged"), ROWS)


def test_mlx_which_ties_by_itself_gets_the_update_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    tuned(base, tmp_path / "adapter", **ENSURED)
    convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=base)
    assert not [
        name for name in load_file(tmp_path / "mlx" / "adapters.safetensors") if OUTPUT in name
    ]
    assert diff(tmp_path / "adapter", tmp_path / "mlx", base=base).equal


def test_it_is_measured_once_and_nothing_is_outside_the_targets(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    tuned(base, tmp_path / "adapter", **ENSURED)
    measured = [module.module for module in audit(tmp_path / "adapter").modules]
    assert measured.count(TABLE) == 1
    assert OUTPUT not in measured
    report = validate(tmp_path / "adapter", base=base, targets=["peft"])
    assert report.findings == ()
