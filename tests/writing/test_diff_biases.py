"""diff and verify compare biases on B as PEFT adds them: at the scale of the update."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from conformance.making import quiet
from safetensors.torch import load_file, save_file
from terminal import PEFT

import adapterkit

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = torch.tensor([[3, 1, 4, 9, 6, 2, 5]])


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """An adapter whose factors and biases are random, at alpha 8."""
    model = base()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_bias=True,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    with quiet():
        tuned: Any = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        with quiet():
            tuned.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def base() -> Any:
    torch.manual_seed(3)
    config = transformers.AutoConfig.from_pretrained(PEFT / "base")
    return transformers.AutoModelForCausalLM.from_config(config).double()


def logits(adapter: Path) -> torch.Tensor:
    with quiet(), torch.no_grad():
        tuned = peft.PeftModel.from_pretrained(base(), adapter, autocast_adapter_dtype=False)
        return tuned(TOKENS).logits


def rescaled(source: Path, out: Path, *, biases: bool) -> Path:
    """Twice the alpha and half of B, and of its bias or not."""
    shutil.copytree(source, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    tensors = load_file(out / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if ".lora_B." in name and (biases or not name.endswith(".bias")):
            tensors[name] = tensor / 2
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("biases", [True, False])
def test_a_bias_is_compared_as_it_is_added(biases: bool, trained: Path, tmp_path: Path) -> None:
    other = rescaled(trained, tmp_path / "b", biases=biases)
    same = bool(torch.allclose(logits(trained), logits(other), atol=1e-9))
    assert same is biases
    found = adapterkit.diff(trained, other)
    assert found.equal is same
    if not same:
        worst = found.modules[0]
        assert "lora_bias" in worst.module
        assert worst.relative_error == pytest.approx(1.0)
