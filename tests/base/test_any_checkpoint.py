"""Any checkpoint that transformers can build is a base, whether a family table describes it or not.

The judges are PEFT's live model, loaded and merged by PEFT, and transformers, which loads what was
merged. Classes are those of fixtures/classes/trained.json (left_out.json beside it says why others
are not among them); `make test` takes every tenth, and `make test-all` all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from quiet_peft import silence

from adapterkit import extract, merge_into, read, validate
from adapterkit.errors import UnsupportedError
from fixtures.classes.tiny import built

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

CLASSES = Path(__file__).parents[2] / "fixtures" / "classes" / "trained.json"
NAMES: list[str] = json.loads(CLASSES.read_text(encoding="utf-8"))
EVERY = 10
# Relative to the largest weight: float32 sums of four products.
CLOSE = 1e-6
# Relative to the update: what is left of it in float32 beside larger weights.
RECOVERED = 1e-4
# PEFT gives two parameters fused into one twice the rank.
RANK, MOST = 4, 8


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with silence():
        yield


def test_classes_are_many_and_others_have_a_reason() -> None:
    reasons = json.loads(CLASSES.with_name("left_out.json").read_text(encoding="utf-8"))
    assert len(NAMES) >= 150
    assert [name for name in NAMES if name in reasons or not hasattr(transformers, name)] == []
    assert all(reasons.values())


def parameters() -> list[Any]:
    marks = [
        () if place % EVERY == 0 else (pytest.mark.all_classes,) for place in range(len(NAMES))
    ]
    return [pytest.param(name, marks=mark) for name, mark in zip(NAMES, marks, strict=True)]


def adapted(model: Any) -> Any:
    """Return a model with random factors on every linear layer; magnitudes as after training."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=8, target_modules="all-linear", init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def updates(model: Any) -> dict[str, tuple[torch.Tensor, bool]]:
    """Return the dense update of each adapted parameter of a PEFT model, by the parameter's name.

    The second value tells whether the parameter is stored (in, out), as those of Conv1D and of
    some experts are.
    """
    found: dict[str, tuple[torch.Tensor, bool]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            wrapper = module if isinstance(module, ParamWrapper) else None
            name = wrapper.parameter_name if wrapper else "weight"
            turned = (
                wrapper.num_experts > 1 and not wrapper._did_swap_in_out_features
                if wrapper
                else getattr(module, "fan_in_fan_out", False)
            )
            place = path.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{place}.{name}"] = module.get_delta_weight("default").detach(), turned
    return found


def module_of(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    if not expected.numel():  # tables of a size that the configuration sets to none
        return value.shape == expected.shape
    value, expected = value.double(), expected.double()
    return bool((value - expected).abs().max() <= CLOSE * expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("name", parameters())
def test_merged_validated_and_extracted(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls: Any = getattr(transformers, name)
    model: Any = built(cls, "cpu")
    model.save_pretrained(tmp_path / "base")
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    live = adapted(model)
    live.save_pretrained(tmp_path / "adapter")
    changes = updates(live)
    assert changes

    loaded = peft.PeftModel.from_pretrained(
        cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    applied = {
        module_of(key)
        for key, (change, _) in updates(loaded).items()
        if key in changes and torch.equal(change, changes[key][0])
    }
    report = validate(tmp_path / "adapter", base=tmp_path / "base", targets=("peft",))
    assert [each for each in report.findings if each.code != "AK307"] == []
    assert (
        set(report.targets[0].coverage["applied"]) == applied == {module_of(key) for key in changes}
    )

    merge_into([tmp_path / "adapter"], tmp_path / "base", tmp_path / "merged")
    merged = cls.from_pretrained(tmp_path / "merged").state_dict()
    expected = loaded.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys() == plain.keys()
    assert [key for key in expected if not close(merged[key], expected[key])] == []

    extract(tmp_path / "base", tmp_path / "merged", tmp_path / "again", rank=MOST)
    found = {pair.module: pair for pair in read(tmp_path / "again").pairs()}
    assert found.keys() == {module_of(key) for key in changes}
    for key, (change, turned) in changes.items():
        whole = (change.transpose(-1, -2) if turned else change).double()
        delta = torch.from_numpy(found[module_of(key)].delta())
        assert (delta - whole).norm() <= RECOVERED * whole.norm(), key


@pytest.mark.parametrize(
    "name", ["LxmertForPreTraining", "BarkFineModel", "ShieldGemma2ForImageClassification"]
)
def test_outputs_that_share_tables_are_modules(name: str, tmp_path: Path) -> None:
    """PEFT adapts an output that the checkpoint does not store; merging asks what becomes of it."""
    cls: Any = getattr(transformers, name)
    model: Any = built(cls, "cpu")
    model.save_pretrained(tmp_path / "base")
    live = adapted(model)
    live.save_pretrained(tmp_path / "adapter")
    report = validate(tmp_path / "adapter", base=tmp_path / "base", targets=("peft",))
    assert [each for each in report.findings if each.code != "AK307"] == []
    assert set(report.targets[0].coverage["applied"]) == set(map(module_of, updates(live)))
    with pytest.raises(UnsupportedError, match="--tied shared changes both"):
        merge_into([tmp_path / "adapter"], tmp_path / "base", tmp_path / "merged")
