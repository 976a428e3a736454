"""Weights that a class makes of stored tensors, or cuts out of one, are modules like others.

NomicBERT's checkpoint stores query, key and value as one, FlexOlmo's its experts one by one. The
judges are PEFT's live model and transformers, which loads what was merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers

from adapterkit import audit, merge_into, open_base
from adapterkit.base.places import Places
from adapterkit.errors import IncompatibleBaseError
from fixtures.classes.tiny import built

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def saved(name: str, folder: Path, **settings: Any) -> Any:
    """Save a tiny model of a class and a random adapter; return PEFT's live model of both."""
    torch.manual_seed(0)
    cls: Any = getattr(transformers, name)
    model: Any = built(cls, "cpu")
    model.save_pretrained(str(folder / "base"))
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings)
    live: Any = peft.get_peft_model(model, config)
    for parameter, value in live.named_parameters():
        if "magnitude" in parameter:
            value.data *= 1.5
    live.save_pretrained(str(folder / "adapter"))
    return live


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "targets", [["q_proj"], ["k_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]]
)
def test_rows_of_one_tensor_are_merged(targets: list[str], tmp_path: Path, *, dora: bool) -> None:
    live = saved("NomicBertModel", tmp_path, target_modules=targets, use_dora=dora)
    merge_into([tmp_path / "adapter"], tmp_path / "base", tmp_path / "merged")
    merged = transformers.NomicBertModel.from_pretrained(str(tmp_path / "merged")).state_dict()
    expected = live.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=1e-6)


def test_each_module_is_held_against_its_own_rows(tmp_path: Path) -> None:
    live = saved("NomicBertModel", tmp_path, target_modules=["q_proj", "v_proj"])
    found = audit(tmp_path / "adapter", base=tmp_path / "base").adapters[0].base
    assert found is not None
    assert found.not_compared == ()
    norms = {each.modules[0]: each.base_frobenius_norm for each in found.weights}
    layers = live.base_model.model.layers
    assert norms == {
        f"layers.{number}.self_attn.{name}": pytest.approx(
            float(getattr(layer.self_attn, name).base_layer.weight.norm()), rel=1e-5
        )
        for number, layer in enumerate(layers)
        for name in ("q_proj", "v_proj")
    }


def test_what_is_no_part_of_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    saved("Molmo2TextModel", tmp_path, target_modules=["k_proj"])
    places = Places(open_base(tmp_path / "base"))
    assert places.has("layers.0.self_attn.k_proj")
    with pytest.raises(IncompatibleBaseError, match=r"makes it of .*att_proj.*; merge in PEFT"):
        merge_into([tmp_path / "adapter"], tmp_path / "base", tmp_path / "merged")
