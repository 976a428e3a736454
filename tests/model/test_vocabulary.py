"""Vocabularies that grew in training, merged into the base that they grew from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tables_oracle import GROWN, ROWS, WIDTH, assert_same, load_model, reloaded, tuned, write_base

from adapterkit import merge_into, validate
from adapterkit.errors import LossyConversionError, UnsupportedError
from adapterkit.files import read

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"
EMBED, HEAD = ["embed_tokens", "q_proj"], ["lm_head", "q_proj"]
BOTH = ["embed_tokens", "lm_head", "q_proj"]
TOKENS = {"trainable_token_indices": [5, 66, 69]}

# What is trained, tied or not, and what --tied is to be: PEFT's live model is right in all.
GROW: dict[str, tuple[bool, str | None, dict[str, Any]]] = {
    "both": (False, None, {"target_modules": BOTH}),
    "both-dora": (False, None, {"target_modules": BOTH, "use_dora": True}),
    "saved": (False, None, {"target_modules": ["q_proj"], "modules_to_save": BOTH[:2]}),
    "frozen": (False, None, {"target_modules": ["q_proj"], "save_embedding_layers": True}),
    "rows": (False, None, {"target_modules": ["q_proj"], **TOKENS}),
    "tied-embed": (True, "untie", {"target_modules": EMBED}),
    "tied-head": (True, "untie", {"target_modules": HEAD}),
    "tied-both": (True, "untie", {"target_modules": BOTH}),
    "tied-saved": (True, "untie", {"target_modules": ["q_proj"], "modules_to_save": BOTH[:1]}),
    "tied-frozen": (True, None, {"target_modules": ["q_proj"], "save_embedding_layers": True}),
    "tied-rows": (True, None, {"target_modules": ["q_proj"], **TOKENS}),
    "ensured-embed": (True, None, {"target_modules": EMBED, "ensure_weight_tying": True}),
    "ensured-head": (True, "shared", {"target_modules": HEAD, "ensure_weight_tying": True}),
    "ensured-untied": (True, "untie", {"target_modules": EMBED, "ensure_weight_tying": True}),
    "ensured-saved": (
        True,
        None,
        {"target_modules": ["q_proj"], "modules_to_save": BOTH[:1], "ensure_weight_tying": True},
    ),
    "ensured-rows": (
        True,
        None,
        {"target_modules": ["q_proj"], "ensure_weight_tying": True} | TOKENS,
    ),
}


@pytest.mark.parametrize("name", GROW)
def test_a_grown_vocabulary_is_the_live_model(name: str, tmp_path: Path) -> None:
    tied, choice, settings = GROW[name]
    base = write_base(tmp_path / "base", tied=tied)
    live = tuned(base, tmp_path / "adapter", rows=GROWN, **settings)
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", tied=choice)
    merged = load_model(tmp_path / "merged")
    assert_same(live, merged, GROWN)
    config, before = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "merged", base)
    )
    untied = {"tie_word_embeddings": False} if choice == "untie" else {}
    assert config == before | {"vocab_size": GROWN} | untied
    changed = {"model.embed_tokens.weight", "lm_head.weight"}
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert new.keys() == old.keys() | ({"lm_head.weight"} if choice == "untie" else set())
    for tensor, value in new.items():
        assert value.dtype is torch.float32
        assert value.shape == ((GROWN, WIDTH) if tensor in changed else old[tensor].shape)
        if tensor not in changed and "q_proj" not in tensor:
            assert torch.equal(value, old[tensor])


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_other_families_grow_alike(family: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True, family=family)
    table = "wte" if family == "gpt2" else "embed_tokens"
    live = tuned(
        base, tmp_path / "adapter", rows=GROWN, target_modules=[table], save_embedding_layers=True
    )
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", tied="untie")
    assert_same(live, load_model(tmp_path / "merged"), GROWN)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", [torch.float32, "stored"])
def test_bases_of_16_bits_grow_and_round_once(stored: Any, trained: Any, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False, dtype=stored)
    kind = stored if trained == "stored" else trained
    tuned(base, tmp_path / "adapter", rows=GROWN, target_modules=BOTH, dtype=kind)
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged")
    held = load_file(tmp_path / "adapter" / WEIGHTS)
    found = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]
    name = "base_model.model.lm_head."
    copy, a, b = (
        held[name + x].double() for x in ("base_layer.weight", "lora_A.weight", "lora_B.weight")
    )
    assert found.dtype is stored
    exact = copy + 1.5 * b @ a
    assert (found.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(stored).eps


def test_sharded_bases_grow_with_their_index(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False, max_shard_size="12KB")
    live = tuned(base, tmp_path / "adapter", rows=GROWN, target_modules=BOTH)
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", dtype="f32")
    assert_same(live, load_model(tmp_path / "merged"), GROWN)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    shards = {
        folder: load_file(tmp_path / "merged" / folder)
        for folder in set(index["weight_map"].values())
    }
    assert len(shards) > 1
    assert all(name in shards[shard] for name, shard in index["weight_map"].items())
    total = sum(t.nbytes for shard in shards.values() for t in shard.values())
    assert index["metadata"]["total_size"] == total


def test_another_type_is_stored_of_new_rows_too(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    tuned(base, tmp_path / "adapter", rows=GROWN, target_modules=BOTH)
    merge_into([tmp_path / "adapter"], base, tmp_path / "wide")
    merge_into([tmp_path / "adapter"], base, tmp_path / "narrow", dtype="bf16")
    wide, narrow = (load_file(tmp_path / x / "model.safetensors") for x in ("wide", "narrow"))
    assert wide.keys() == narrow.keys()
    for name, value in narrow.items():
        torch.testing.assert_close(value, wide[name].to(torch.bfloat16), rtol=2**-8, atol=0)


def test_a_merge_that_grew_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.merging.into import checkpoint

    base = write_base(tmp_path / "base", tied=False, max_shard_size="12KB")
    tuned(base, tmp_path / "adapter", rows=GROWN, target_modules=BOTH)
    merge_into([tmp_path / "adapter"], base, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_write_index", _stopped)
        with pytest.raises(KeyboardInterrupt):
            merge_into([tmp_path / "adapter"], base, tmp_path / "merged", resume=True)
    assert not (tmp_path / "merged").exists()
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged", resume=True)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


def _stopped(*_: object) -> None:
    raise KeyboardInterrupt


def test_new_tokens_without_their_rows_are_refused_with_a_way_out(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    for name, settings in {
        "both": {"target_modules": BOTH},
        "rows": {"target_modules": ["q_proj"], **TOKENS},
    }.items():
        adapter = tmp_path / name
        tuned(base, adapter, rows=GROWN, save_embedding_layers=False, **settings)
        with pytest.raises(LossyConversionError, match="saved after resize_token_embeddings"):
            merge_into([adapter], base, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        report = merge_into([adapter], base, tmp_path / f"{name}-cut", allow_lossy=True)
        cut = load_file(tmp_path / f"{name}-cut" / "model.safetensors")
        assert cut["model.embed_tokens.weight"].shape == (ROWS, WIDTH)
        assert any("model.embed_tokens" in note for note in report.notes)


def test_a_table_whose_rows_nobody_carries_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    tuned(base, tmp_path / "adapter", rows=GROWN, target_modules=EMBED)
    with pytest.raises(
        UnsupportedError, match=r"different rows \(lm_head.weight 64, .*embed_tokens.weight 70\)"
    ):
        merge_into([tmp_path / "adapter"], base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("rows", [ROWS, GROWN])
def test_a_frozen_copy_of_another_base_is_refused(rows: int, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    tuned(base, tmp_path / "adapter", rows=rows, target_modules=BOTH)
    held = load_file(tmp_path / "adapter" / WEIGHTS)
    held["base_model.model.lm_head.base_layer.weight"][9] += 1
    save_file(held, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(LossyConversionError, match=r"another row 9 than lm_head\.weight"):
        merge_into([tmp_path / "adapter"], base, tmp_path / "merged")


def test_a_base_of_the_grown_vocabulary_takes_the_update_as_it_is(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    live = tuned(base, tmp_path / "adapter", rows=GROWN, target_modules=BOTH)
    live.unload().save_pretrained(tmp_path / "resized")
    live = tuned(tmp_path / "resized", tmp_path / "adapter", rows=GROWN, target_modules=BOTH)
    merge_into([tmp_path / "adapter"], tmp_path / "resized", tmp_path / "merged")
    assert_same(live, load_model(tmp_path / "merged"), GROWN)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_base_stays(tied: bool, tmp_path: Path) -> None:
    """A base of 128 rows, of which the last are zeros, and an adapter of the 64 that are used."""
    trained, padded = (tmp_path / name for name in ("trained", "padded"))
    write_base(trained, tied=tied)
    model = load_model(trained)
    model.resize_token_embeddings(128, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.data[ROWS:] = 0
    model.save_pretrained(padded)
    live = tuned(trained, tmp_path / "adapter", target_modules=BOTH)
    merge_into([tmp_path / "adapter"], padded, tmp_path / "merged", tied="untie" if tied else None)
    merged = load_model(tmp_path / "merged")
    assert merged.config.vocab_size == 128
    assert not merged.lm_head.weight[ROWS:].any()
    assert_same(live, merged, ROWS)


def test_padding_of_the_adapter_is_cut(tmp_path: Path) -> None:
    """Trained on 128 rows of which the last were zeros and got no update, for a base of 64."""
    base = write_base(tmp_path / "base", tied=False)
    tuned(base, tmp_path / "adapter", rows=128, target_modules=BOTH)
    held = load_file(tmp_path / "adapter" / WEIGHTS)
    for name, value in held.items():
        if "base_layer" in name or "lm_head.lora_B" in name:
            value[ROWS:] = 0
        elif "lora_embedding_A" in name:
            value[:, ROWS:] = 0
    save_file(held, tmp_path / "adapter" / WEIGHTS)
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert merged.config.vocab_size == ROWS
    for module in ("model.embed_tokens", "lm_head"):
        [pair] = [each for each in read(tmp_path / "adapter").pairs() if each.module == module]
        update = pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy().astype(float)
        update = update.T if pair.embedding else update
        before = load_model(base).get_submodule(module).weight.detach().double().numpy()
        after = merged.get_submodule(module).weight.detach().double().numpy()
        np.testing.assert_allclose(after, before + update[:ROWS], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({"target_modules": BOTH}, "AK304", "the base has 64 x 32 here, the adapter 70 x 32"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": BOTH[:2]},
            "AK313",
            "is stored whole, 70 x 32, and the base has 64 x 32 here",
        ),
        ({"target_modules": ["q_proj"], **TOKENS}, "AK313", "trains the row of token 69"),
    ],
    ids=["factors", "whole", "rows"],
)
def test_validate_says_that_peft_refuses_rows_that_the_base_has_not(
    settings: dict[str, Any], code: str, message: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", tied=False)
    tuned(base, tmp_path / "adapter", rows=GROWN, save_embedding_layers=False, **settings)
    with pytest.raises((RuntimeError, IndexError)):
        reloaded(base, tmp_path / "adapter")
    found = validate(tmp_path / "adapter", base=base, targets=["peft"]).findings
    assert {finding.code for finding in found} == {code}
    assert any(message in finding.message for finding in found)
    model = load_model(base)
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    reloaded(tmp_path / "resized", tmp_path / "adapter")
    again = validate(tmp_path / "adapter", base=tmp_path / "resized", targets=["peft"])
    assert again.findings == ()


def test_adapters_of_fewer_rows_go_into_the_grown_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    tuned(base, tmp_path / "one", rows=GROWN, target_modules=BOTH)
    tuned(base, tmp_path / "other", target_modules=BOTH)
    merge_into([tmp_path / "one"], base, tmp_path / "first")
    merge_into([tmp_path / "one", tmp_path / "other"], base, tmp_path / "merged")
    first, both, held = (
        load_file(tmp_path / path)
        for path in ("first/model.safetensors", "merged/model.safetensors", f"other/{WEIGHTS}")
    )
    name = "base_model.model.lm_head.lora_"
    expected = first["lm_head.weight"].clone()
    expected[:ROWS] += 1.5 * held[name + "B.weight"] @ held[name + "A.weight"]
    torch.testing.assert_close(both["lm_head.weight"], expected, rtol=1e-5, atol=1e-6)


def test_adapters_of_other_new_tokens_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    for place, name in enumerate(("one", "other")):
        tuned(base, tmp_path / name, rows=GROWN, target_modules=BOTH)
        held = load_file(tmp_path / name / WEIGHTS)
        held["base_model.model.lm_head.base_layer.weight"][66] += place
        save_file(held, tmp_path / name / WEIGHTS)
    with pytest.raises(UnsupportedError, match="carries another row 66"):
        merge_into([tmp_path / "one", tmp_path / "other"], base, tmp_path / "merged")
