"""Where PEFT loses names that it saved itself, validate tells it, and convert writes what it loads.

The judge is PEFT, which loads both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from quiet_peft import silence
from safetensors.torch import load_file

from adapterkit import convert, merge_into, read, validate
from adapterkit.errors import LossyConversionError
from fixtures.classes.tiny import built

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLASSES = [
    "LagunaForCausalLM",
    "MistralLarge4TextModel",
    "PI0ForConditionalGeneration",
    "UnlimitedOcrForConditionalGeneration",
]
SETTINGS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "some, of several ranks": {
        "target_modules": r".*(shared_experts\.up_proj|q_proj|action_in_proj)",
        "rank_pattern": {r".*(shared_experts\.up_proj|layers\.0.*q_proj|action_in_proj)": 2},
    },
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with silence():
        yield


def updates(model: Any) -> dict[str, torch.Tensor]:
    """Return the dense update of every adapted module of a PEFT model, by its path."""
    root = "base_model.model."
    return {
        path.removeprefix(root).replace(".base_layer", ""): layer.get_delta_weight("default")
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def arrived(model: Any, adapter: Path, trained: dict[str, torch.Tensor]) -> set[str]:
    loaded = updates(peft.PeftModel.from_pretrained(model, str(adapter)))
    assert loaded.keys() == trained.keys()
    return {name for name, change in loaded.items() if torch.equal(change, trained[name])}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", CLASSES)
def test_lost_names_are_told_and_written_as_peft_loads_them(
    name: str, settings: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    cls: Any = getattr(transformers, name)
    base, adapter, written = tmp_path / "base", tmp_path / "adapter", tmp_path / "written"
    model: Any = built(cls, "cpu")
    model.save_pretrained(str(base))
    config = peft.LoraConfig(r=4, init_lora_weights=False, **SETTINGS[settings])
    live = peft.get_peft_model(model, config)
    live.save_pretrained(str(adapter))
    trained = {key: change.detach() for key, change in updates(live).items()}

    report = validate(adapter, base=base, targets=["peft"])
    found = arrived(cls.from_pretrained(base), adapter, trained)
    assert 0 < len(found) < len(trained)
    assert set(report.targets[0].coverage["applied"]) == found
    assert set(report.targets[0].coverage["ignored"]) == trained.keys() - found
    assert str(report.targets[0].verdict) == "partly applied"

    convert(adapter, written, base=base, for_engine="peft")
    assert arrived(cls.from_pretrained(base), written, trained) == trained.keys()
    report = validate(written, base=base, targets=["peft"])
    assert [each for each in report.findings if each.code != "AK307"] == []
    assert str(report.targets[0].verdict) == "applied"

    for each in (adapter, written):
        merge_into([each], base, tmp_path / f"{each.name}-merged")
    one, other = (
        load_file(tmp_path / f"{each}-merged" / "model.safetensors")
        for each in ("adapter", "written")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_experts_are_written_as_peft_loads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls = transformers.MistralLarge4TextModel
    base, adapter, written = tmp_path / "base", tmp_path / "adapter", tmp_path / "written"
    model: Any = built(cls, "cpu")
    model.save_pretrained(str(base))
    config = peft.LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=["o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    live = peft.get_peft_model(model, config)
    live.save_pretrained(str(adapter))
    stored = {k: v.clone() for k, v in live.state_dict().items() if "lora_" in k}

    def lost(folder: Path) -> set[str]:
        loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(base), str(folder))
        now = loaded.state_dict()
        return {k for k, v in stored.items() if not torch.equal(v, now[k])}

    assert {"experts" in key for key in lost(adapter)} == {True}
    report = validate(adapter, base=base, targets=["peft"])
    assert all("experts" in module for module in report.targets[0].coverage["ignored"])
    assert report.targets[0].coverage["ignored"]
    convert(adapter, written, base=base, for_engine="peft")
    assert lost(written) == set()
    assert str(validate(written, base=base, targets=["peft"]).targets[0].verdict) == "applied"


def test_what_no_name_leads_to_is_a_loss_for_peft_and_merges(tmp_path: Path) -> None:
    """A renaming that ends in `.weight` finds its name in every spelling of the file."""
    torch.manual_seed(0)
    cls = transformers.Inkling2ForCausalLM
    base, adapter, written = tmp_path / "base", tmp_path / "adapter", tmp_path / "written"
    model: Any = built(cls, "cpu")
    model.save_pretrained(str(base))
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["weight_proj", "q_proj.linear"]
    )
    live = peft.get_peft_model(model, config)
    live.save_pretrained(str(adapter))
    trained = {key: change.detach() for key, change in updates(live).items()}
    found = arrived(cls.from_pretrained(base), adapter, trained)
    lost = trained.keys() - found
    assert {name.rpartition(".")[2] for name in lost} == {"weight_proj"}
    report = validate(adapter, base=base, targets=["peft"])
    assert set(report.targets[0].coverage["ignored"]) == lost
    with pytest.raises(LossyConversionError, match="weight_proj"):
        convert(adapter, written, base=base, for_engine="peft")
    convert(adapter, written, base=base, for_engine="peft", allow_lossy=True)
    assert set(read(written).modules) == found

    merge_into([adapter], base, tmp_path / "merged")
    merged = cls.from_pretrained(tmp_path / "merged").state_dict()
    expected = live.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(merged[key], value, rtol=0, atol=1e-6), key
