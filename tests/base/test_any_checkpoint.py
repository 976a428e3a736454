"""Any checkpoint that transformers can build is a base, whether a family table describes it or not.

The judges are PEFT's live model (each target's dense W + ΔW) and transformers, which loads what was
merged. Classes are those of fixtures/classes/trained.json; `make test` takes every tenth, and
`make test-all` all.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers

from adapterkit import extract, merge_into, read, validate
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


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Silence what transformers and PEFT say of configurations that no one would train."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    transformers.logging.set_verbosity(level)


def parameters() -> list[Any]:
    marks = [
        () if place % EVERY == 0 else (pytest.mark.all_classes,) for place in range(len(NAMES))
    ]
    return [pytest.param(name, marks=mark) for name, mark in zip(NAMES, marks, strict=True)]


def adapted(model: Any) -> Any:
    """Return a model with random factors on every linear layer; magnitudes as after training."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def layers(model: Any) -> dict[str, Any]:
    """Return PEFT's layers by their path in the model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("name", parameters())
def test_merged_validated_and_extracted(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls: Any = getattr(transformers, name)
    model: Any = built(cls, "cpu")
    model.save_pretrained(tmp_path / "base")
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    live = adapted(model)
    live.save_pretrained(tmp_path / "adapter")
    adapted_layers = layers(live)
    changes = {name: layer.get_delta_weight("default") for name, layer in adapted_layers.items()}

    report = validate(tmp_path / "adapter", base=tmp_path / "base", targets=("peft",))
    assert [each for each in report.findings if each.code != "AK307"] == []

    merge_into([tmp_path / "adapter"], tmp_path / "base", tmp_path / "merged")
    merged = cls.from_pretrained(tmp_path / "merged").state_dict()
    for key, tensor in plain.items():
        change = changes.get(key.removesuffix(".weight"), 0)
        if key not in merged or not tensor.is_floating_point():
            continue
        expected = tensor + change
        assert (merged[key] - expected).abs().max() <= CLOSE * expected.abs().max().clamp(min=1), (
            key
        )

    extract(tmp_path / "base", tmp_path / "merged", tmp_path / "again", rank=4)
    found = {pair.module: pair for pair in read(tmp_path / "again").pairs()}
    assert found.keys() == changes.keys()
    for module, change in changes.items():
        ((b, a),) = found[module].matrices()
        delta = torch.from_numpy(b @ a).double() * found[module].scale
        expected = (change.T if adapted_layers[module].fan_in_fan_out else change).double()
        assert (delta - expected).norm() <= RECOVERED * expected.norm(), module
