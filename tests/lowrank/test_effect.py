"""Whether an adapter does anything, against PEFT's live logits: every command says the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from declared_settings import PROMPT, TARGETS, logits, trained
from declared_settings import base as base  # noqa: PLC0414  (a fixture)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from adapterkit import compress_file, convert, merge_into, validate
from adapterkit.files import read
from adapterkit.lowrank.effect import IDLE, idle
from adapterkit.projection import project_file
from adapterkit.tinylora import TinySettings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

ACTING: dict[str, dict[str, Any]] = {
    "magnitudes": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": [3, 5]},
    "biases on B": {"lora_bias": True},
    "biases": {"bias": "all"},
}


def with_zero_factors(base: Path, folder: Path, **settings: Any) -> Path:
    adapter = trained(base, folder, **TARGETS, **settings)
    weights = adapter / "adapter_model.safetensors"
    stored = load_file(weights)
    zeros = {n: torch.zeros_like(x) for n, x in stored.items() if n.endswith("lora_B.weight")}
    save_file({**stored, **zeros}, weights, {"format": "pt"})
    return adapter


def untuned(base: Path) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(base).eval()(PROMPT).logits.numpy()


@pytest.mark.parametrize("kind", ACTING)
def test_what_acts_without_factors_is_an_effect(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = with_zero_factors(base, tmp_path / "a", **ACTING[kind])
    assert not np.allclose(logits(base, adapter), untuned(base), atol=1e-3)
    assert not idle(read(adapter, base=base))
    report = validate(adapter, base=base, targets=["peft"])
    assert {each.code for each in report.findings} == {"AK205"}
    assert report.exit_code == 0
    done = merge_into([adapter], base, tmp_path / "m")
    assert not any(IDLE in note for note in done.notes)


def test_what_changes_nothing_is_told_by_every_command(base: Path, tmp_path: Path) -> None:
    adapter = with_zero_factors(base, tmp_path / "a")
    assert np.array_equal(logits(base, adapter), untuned(base))
    assert idle(read(adapter, base=base))
    report = validate(adapter, base=base, targets=["peft"])
    assert [each.code for each in report.findings] == ["AK202"]
    tiny = TinySettings(projection_dim=4)
    for done in (
        convert(adapter, tmp_path / "p", base=base),
        compress_file(adapter, tmp_path / "c", rank=2),
        merge_into([adapter], base, tmp_path / "m"),
        project_file(adapter, tmp_path / "t", base=base, settings=tiny),
    ):
        assert sum(IDLE in note for note in done.notes) == 1


def test_a_bias_of_zeros_is_no_effect(base: Path, tmp_path: Path) -> None:
    adapter = with_zero_factors(base, tmp_path / "a", lora_bias=True)
    weights = adapter / "adapter_model.safetensors"
    stored = {
        name: torch.zeros_like(x) if "lora_B" in name else x
        for name, x in load_file(weights).items()
    }
    save_file(stored, weights, {"format": "pt"})
    assert np.array_equal(logits(base, adapter), untuned(base))
    assert idle(read(adapter, base=base))
    assert "AK202" in {each.code for each in validate(adapter, base=base).findings}
