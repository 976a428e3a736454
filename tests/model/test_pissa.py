"""PiSSA and OLoRA adapters, made plain with the base, are the model that PEFT loads."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from dense_updates import dense
from engine import family_row, make_base
from pissa_models import TARGETS, apart, loaded, logits, merged, relative, tuned
from pissa_models import base as base  # noqa: PLC0414  (a fixture)
from pissa_models import quiet as quiet  # noqa: PLC0414  (a fixture)
from safetensors.torch import load_file, save_file
from small_llama import saved_llama
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import adapterkit
from adapterkit.base import open_base
from adapterkit.formats.peft.reader import read_peft
from adapterkit.formats.peft.writer import write_peft
from adapterkit.formats.protocol import FormatOptions
from adapterkit.passes.initialisation import undone
from adapterkit.passes.protocol import Context

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

transformers.utils.logging.disable_progress_bar()
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 5},
        "alpha_pattern": {"k_proj": 3},
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_update_of_the_original_base_is_the_one_that_peft_merges(
    init: str, settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    path = tuned(base, tmp_path, init, **settings)
    truth, raw = merged(base, path), read_peft(path, FormatOptions())
    plain = undone(raw, Context(base=open_base(base))).adapter
    ranks = {pair.module: pair.rank for pair in raw.pairs()}
    naive, ours = dense(raw), dense(plain)
    assert len(ours) == 2 * len(TARGETS)
    for pair in plain.pairs():
        module = pair.module
        assert relative(ours[module], truth[f"{module}.weight"]) < 3e-6, module
        assert relative(naive[module], truth[f"{module}.weight"]) > 0.1, module
        assert pair.rank == 2 * ranks[module]
        assert pair.scale == raw.scales[module]
    assert plain.initialisation is None


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_is_written_gives_peft_the_same_logits(
    init: str, dora: bool, base: Path, tmp_path: Path
) -> None:
    path = tuned(base, tmp_path / "pissa", init, use_dora=dora)
    plain = undone(read_peft(path, FormatOptions()), Context(base=open_base(base))).adapter
    write_peft(plain, tmp_path / "plain", FormatOptions(base=open_base(base)))
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    want, got = logits(loaded(base, path)), logits(loaded(base, tmp_path / "plain"))
    effect = (want - logits(LlamaForCausalLM.from_pretrained(base))).norm()
    assert effect > 1e-1
    assert (got - want).norm() < 1e-5 * effect


def test_pissa_on_conv1d_follows_the_turned_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    apart(model)
    model.save_pretrained(tmp_path / "base")
    path = tuned(
        tmp_path / "base",
        tmp_path / "pissa",
        "pissa",
        GPT2LMHeadModel,
        target_modules=["c_attn", "c_fc", "c_proj"],
        fan_in_fan_out=True,
    )
    truth = merged(tmp_path / "base", path, GPT2LMHeadModel)
    ours = dense(
        undone(read_peft(path, FormatOptions()), Context(base=open_base(tmp_path / "base"))).adapter
    )
    assert len(ours) == 4
    for module, update in ours.items():
        assert relative(update, truth[f"{module}.weight"].T) < 3e-6, module


def test_olora_on_a_square_conv1d_follows_the_stored_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    path = tuned(
        tmp_path / "base",
        tmp_path / "olora",
        "olora",
        GPT2LMHeadModel,
        target_modules=["attn.c_proj"],
        fan_in_fan_out=True,
    )
    truth = merged(tmp_path / "base", path, GPT2LMHeadModel)
    ours = dense(
        undone(read_peft(path, FormatOptions()), Context(base=open_base(tmp_path / "base"))).adapter
    )
    ((module, update),) = ours.items()
    assert relative(update, truth[f"{module}.weight"].T) < 3e-6


def test_embeddings_keep_their_factors(base: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        path = tuned(base, tmp_path, "pissa", target_modules=["embed_tokens", "q_proj"])
    raw = read_peft(path, FormatOptions())
    plain = undone(raw, Context(base=open_base(base))).adapter
    before = {pair.module: pair for pair in raw.pairs()}
    after = {pair.module: pair for pair in plain.pairs()}
    assert after["model.embed_tokens"] == before["model.embed_tokens"]
    assert after["model.layers.0.self_attn.q_proj"].rank == 8
    want = merged(base, path)["model.embed_tokens.weight"]
    np.testing.assert_allclose(dense(plain)["model.embed_tokens"].T, want, atol=1e-6)


def test_half_precision_factors_lose_nothing(base: Path, tmp_path: Path) -> None:
    path = tuned(base, tmp_path, "pissa")
    weights = path / "adapter_model.safetensors"
    halved = {name: x.to(torch.bfloat16) for name, x in load_file(weights).items()}
    save_file(halved, weights)
    raw = read_peft(path, FormatOptions())
    plain = undone(raw, Context(base=open_base(base))).adapter
    for old, new in zip(raw.pairs(), plain.pairs(), strict=True):
        np.testing.assert_array_equal(new.a.numpy()[:4], old.a.numpy().astype(np.float32))
        np.testing.assert_array_equal(new.b.numpy()[:, :4], old.b.numpy().astype(np.float32))


def test_rounding_in_training_is_noted_where_it_shows(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    path = tuned(base, tmp_path / "pissa", "pissa")
    clean = undone(read_peft(path, FormatOptions()), Context(base=open_base(base)))
    rounded = undone(read_peft(path, FormatOptions()), Context(base=open_base(tmp_path / "base")))
    assert not any("BF16" in str(note) for note in clean.notes)
    assert any("rounded to BF16" in str(note) for note in rounded.notes)


def crowded(base: Path, folder: Path, gap: float) -> Path:
    """Save a base whose fourth and fifth singular value of one weight differ by `gap`."""
    model = LlamaForCausalLM.from_pretrained(base)
    weight = model.model.layers[0].self_attn.q_proj.weight
    u, s, vh = torch.linalg.svd(weight.data.double())
    s[4] = s[3] * (1 - gap)
    weight.data = (u @ torch.diag(s) @ vh).float()
    model.save_pretrained(folder)
    return folder


def test_crowded_singular_values_are_noted_with_a_bound(base: Path, tmp_path: Path) -> None:
    near = crowded(base, tmp_path / "near", 3e-6)
    path = tuned(near, tmp_path / "pissa", "pissa", target_modules=["q_proj"])
    done = undone(read_peft(path, FormatOptions()), Context(base=open_base(near)))
    (note,) = [str(note) for note in done.notes if "may amount to" in str(note)]
    plain = done.adapter
    module, bound = note.split(":")[0], float(note.split("amount to ")[1].split(" ")[0])
    assert module == "model.layers.0.self_attn.q_proj"
    error = relative(dense(plain)[module], merged(near, path)[f"{module}.weight"])
    assert 1e-6 < error < bound < 1e-1


def test_singular_values_that_agree_are_refused(base: Path, tmp_path: Path) -> None:
    same = crowded(base, tmp_path / "same", 0)
    path = tuned(same, tmp_path / "pissa", "pissa", target_modules=["q_proj"])
    with pytest.raises(adapterkit.UnsupportedError, match="so close together") as caught:
        undone(read_peft(path, FormatOptions()), Context(base=open_base(same)))
    assert caught.value.where == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("pissa_niter_4", "randomised"),
        ("corda", "covariance"),
        ("lora_ga", "gradients"),
        ("loftq", "quantisation"),
        ("olora_v2", "does not know"),
    ],
)
def test_what_the_base_does_not_tell_is_refused_with_the_way_out(
    init: str, reason: str, base: Path, tmp_path: Path
) -> None:
    path = tuned(base, tmp_path, "gaussian")
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": init}))
    raw = read_peft(path, FormatOptions())
    if init == "olora_v2":
        raw = raw.replace(initialisation=init)
    with pytest.raises(adapterkit.UnsupportedError, match=reason) as caught:
        undone(raw, Context(base=open_base(base)))
    assert "path_initial_model_for_weight_conversion" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_tied_output_is_refused_for_what_it_is(init: str, tmp_path: Path) -> None:
    base = saved_llama(tmp_path / "base", apart, tie_word_embeddings=True)
    path = tuned(base, tmp_path / "a", init, target_modules=["q_proj", "lm_head"])
    before = LlamaForCausalLM.from_pretrained(base).get_input_embeddings().weight
    after = loaded(base, path).get_input_embeddings().weight
    assert not torch.allclose(before, after), "PEFT changes the embedding too"
    with pytest.raises(adapterkit.UnsupportedError, match=r"embed_tokens.*changed both") as caught:
        adapterkit.convert(path, tmp_path / "out", to="peft", base=base)
    assert caught.value.where == "lm_head"
    assert not (tmp_path / "out").exists()


def test_into_a_gguf_it_goes_by_way_of_a_plain_adapter(tmp_path: Path) -> None:
    base = make_base(family_row("llama"), tmp_path)
    path = tuned(base.hf, tmp_path / "olora", "olora")
    with pytest.raises(adapterkit.BaseRequiredError, match=r"adapterkit convert .* --base MODEL"):
        adapterkit.merge_into([path], base.gguf, tmp_path / "merged.gguf")
    adapterkit.convert(path, tmp_path / "plain", to="peft", base=base.hf)
    adapterkit.merge_into([tmp_path / "plain"], base.gguf, tmp_path / "merged.gguf")


def test_base_must_be_there_with_its_weights(base: Path, tmp_path: Path) -> None:
    raw = read_peft(tuned(base, tmp_path, "pissa"), FormatOptions())
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        undone(raw, Context(base=None))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(adapterkit.BaseRequiredError, match="has no Hugging Face weights"):
        undone(raw, Context(base=open_base(tmp_path / "bare")))


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    saved_llama(tmp_path / "other", intermediate_size=40)
    raw = read_peft(tuned(base, tmp_path / "pissa", "pissa"), FormatOptions())
    with pytest.raises(adapterkit.IncompatibleBaseError, match="the base has"):
        undone(raw, Context(base=open_base(tmp_path / "other")))
