"""Where modules stand in a checkpoint, and which base an adapter means."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapterkit import validate
from adapterkit.base import open_base
from adapterkit.base.classes import model_class
from adapterkit.base.places import Places
from adapterkit.loading import load
from fixtures.classes.compact import apply, prefixes

if TYPE_CHECKING:
    from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForSequenceClassification"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 16,
}
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def checkpoint(folder: Path, config: dict[str, Any], *names: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if names:
        arrays = {name: np.ones((8, 8), np.float32) for name in names}
        save_file(arrays, folder / "model.safetensors")
    return folder


def adapter(folder: Path, *saved: str, **config: Any) -> Path:
    folder.mkdir()
    arrays = {
        f"{QUERY}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{QUERY}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    arrays |= {f"base_model.model.{name}": np.ones((8, 8), np.float32) for name in saved}
    save_file(arrays, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("where", ["beside", "current", "whole"])
def test_a_base_named_by_a_path_is_used(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint(tmp_path / "base", LLAMA)
    named = {"beside": "../base", "current": "base", "whole": str(base)}[where]
    monkeypatch.chdir(tmp_path)
    found = load(adapter(tmp_path / "adapter", base_model_name_or_path=named))
    assert found.base is not None
    assert found.base.path.resolve() == base / "config.json"
    assert any("which the adapter names" in note for note in found.told)


def test_a_path_that_leads_nowhere_is_no_base(tmp_path: Path) -> None:
    assert load(adapter(tmp_path / "a", base_model_name_or_path="../gone")).base is None


@pytest.mark.parametrize(
    ("saved", "names", "said"),
    [
        (["score.weight"], ["score.weight"], []),
        (["score.weight"], ["score.weight", "classifier.weight"], ["classifier"]),
        ([], ["score.weight"], ["score"]),
    ],
)
def test_heads_that_peft_names_itself_are_no_error(
    saved: list[str], names: list[str], said: list[str], tmp_path: Path
) -> None:
    stored = ("model.layers.0.self_attn.q_proj.weight", *names)
    base = checkpoint(tmp_path / "base", LLAMA, *stored)
    heads = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    report = validate(adapter(tmp_path / "a", *saved, **heads), base=base, targets=("peft",))
    assert [m for each in report.findings for m in each.modules if each.code == "AK112"] == said


def test_modules_are_found_under_their_names_on_disk(tmp_path: Path) -> None:
    stored = "vit.encoder.layer.0.attention.attention.query.weight"
    config = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}
    places = Places(open_base(checkpoint(tmp_path / "vit", config, stored)))
    live = "vit.layers.0.attention.q_proj"
    assert places.of(live) == stored
    assert places.of("layers.0.attention.q_proj") == stored
    assert places.of(stored.removesuffix(".weight")) == stored
    assert places.of("vit.layers.1.attention.q_proj") is None
    assert places.live("vit.encoder.layer.0.attention.attention.query") == live


def test_only_a_class_or_its_shape_tells_how_a_square_is_stored() -> None:
    kinds = {
        name: found.kind("transformer.h.3.attn.c_proj.weight")
        for name in ("GPT2LMHeadModel", "ImageGPTForImageClassification")
        if (found := model_class(name))
    }
    assert set(kinds.values()) == {"conv1d"}
    assert model_class("NoSuchModel") is None


def test_prefixes_tell_every_name() -> None:
    names = {
        "model.vision.layers.N.q": "visual.blocks.N.query",
        "model.vision.layers.N.k": "visual.blocks.N.k",
        "model.vision.norm": "visual.norm",
        "model.text.layers.N.q": "model.layers.N.q",
        "lm_head": "lm_head",
    }
    rules = prefixes(names)
    assert {name: apply(rules, name) for name in names} == names
    assert len(rules) < len(names)
