"""Checkpoints that number what the class calls by names: projectors of two layers, one backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers

from adapterkit import extract, merge_into, read, validate
from adapterkit.base.classes import model_class, renamed
from fixtures.classes.tiny import built

if TYPE_CHECKING:
    from pathlib import Path

# PEFT asks transformers by a name that is leaving.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_numbers_stand_for_layers_or_for_names() -> None:
    rules = {"proj.#0": "first", "proj.#2": "last", "encoder.#0.layer.N": "blocks.N"}
    assert renamed("proj.0.weight", rules) == "first.weight"
    assert renamed("proj.2.weight", rules) == "last.weight"
    assert renamed("proj.1.weight", rules) == "proj.1.weight"
    assert renamed("encoder.0.layer.7.q", rules) == "blocks.7.q"
    assert renamed("encoder.1.layer.7.q", rules) == "encoder.1.layer.7.q"
    back = {new: old for old, new in rules.items()}
    assert renamed("first.weight", back) == "proj.0.weight"
    assert renamed("blocks.7.q", back) == "encoder.0.layer.7.q"


@pytest.mark.parametrize(
    ("name", "path", "stored"),
    [
        ("Kimi_K25ForConditionalGeneration", "model.mm_projector.out_proj", "mm_projector.proj.2"),
        ("QianfanOCRForConditionalGeneration", "model.multi_modal_projector.linear_1", "mlp1.1"),
    ],
)
def test_classes_know_the_numbers_of_their_projectors(name: str, path: str, stored: str) -> None:
    known = model_class(name)
    assert known
    found = [renaming.disk(path) for renaming in known.renamings]
    assert stored in found
    renaming = known.renamings[found.index(stored)]
    assert renaming.memory(f"{stored}.weight") == f"{path}.weight"


def test_a_numbered_projector_is_told_merged_and_extracted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls = transformers.Kimi_K25ForConditionalGeneration
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    model: Any = built(cls, "cpu")
    model.save_pretrained(str(base))
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["in_proj", "out_proj", "o_proj"]
    )
    live = peft.get_peft_model(model, config)
    live.save_pretrained(str(adapter))
    report = validate(adapter, base=base, targets=["peft"])
    assert [each for each in report.findings if each.code != "AK307"] == []
    assert str(report.targets[0].verdict) == "applied"

    merge_into([adapter], base, merged)
    found = cls.from_pretrained(merged).state_dict()
    for key, value in live.merge_and_unload().state_dict().items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-6), key
    extract(base, merged, tmp_path / "again", rank=4)
    assert set(read(tmp_path / "again").modules) == set(read(adapter).modules)
