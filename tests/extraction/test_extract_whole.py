"""What is saved whole loads in PEFT, which takes every module whose path ends with a saved name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from peft import PeftModel
from quiet_peft import quiet_peft
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

from adapterkit import extract
from adapterkit.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}


def changed(base: Path, folder: Path, *names: str) -> Path:
    """Copy a checkpoint; named matrices get one rank more, all else that is named noise."""
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    generator = torch.Generator().manual_seed(2)
    stored = load_file(base / "model.safetensors")
    for name in names:
        shape = stored[name].shape
        if len(shape) == 2:
            change = torch.outer(*(torch.randn(size, generator=generator) for size in shape))
        else:
            change = torch.randn(shape, generator=generator)
        stored[name] = stored[name] + change
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_norm_at_the_top_is_saved_with_all_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)
    LlamaModel(config).save_pretrained(tmp_path / "base")
    names = ("norm.weight", "layers.1.input_layernorm.weight", "layers.0.self_attn.q_proj.weight")
    tuned = changed(tmp_path / "base", tmp_path / "tuned", *names)
    report = extract(tmp_path / "base", tuned, tmp_path / "back", rank=1, save_rest=True)
    assert report.warnings == ()
    ids = torch.arange(9)[None]
    with quiet_peft(), torch.no_grad():
        base = LlamaModel.from_pretrained(tmp_path / "base")
        back = PeftModel.from_pretrained(base, tmp_path / "back").eval()
        wanted = LlamaModel.from_pretrained(tuned).eval()(ids).last_hidden_state
        found = back(ids).last_hidden_state
    assert torch.allclose(found, wanted, atol=1e-5)


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.q_proj = nn.Linear(8, 8)
        self.proj = nn.BatchNorm1d(8)
        self.norm = nn.BatchNorm1d(8)
        self.x_norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.x_norm(self.norm(self.proj(self.q_proj(x * self.scale))))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file(Mine().state_dict(), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    config = {"model_type": "mine", "architectures": ["Mine"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "base"


def live(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = Mine()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    whole = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return whole.eval()(torch.linspace(-1, 1, 24).reshape(3, 8))


def test_all_that_is_stored_of_a_saved_module_is_saved(mine: Path, tmp_path: Path) -> None:
    tuned = changed(mine, tmp_path / "tuned", "norm.weight", "q_proj.weight", "q_proj.bias")
    report = extract(mine, tuned, tmp_path / "back", rank=1, save_rest=True)
    assert report.warnings == ()
    assert torch.allclose(live(mine, tmp_path / "back"), live(tuned), atol=1e-5)


def test_what_peft_cannot_load_one_inside_the_other_is_left_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, patch_size=8)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    query = "encoder.layer.0.attention.attention.query.weight"
    tuned = changed(tmp_path / "base", tmp_path / "tuned", query, "embeddings.cls_token")
    report = extract(tmp_path / "base", tuned, tmp_path / "back", save_rest=True)
    (left,) = report.left_over
    assert left.tensor == "embeddings.cls_token"
    assert not left.saved
    assert "patch_embeddings inside of embeddings, which it cannot load" in left.reason
    with quiet_peft():
        base = ViTModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
        PeftModel.from_pretrained(base, tmp_path / "back")


def test_what_holds_an_adapted_module_is_left_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=8)
    CLIPVisionModel(config).save_pretrained(tmp_path / "base")
    table, vector = "embeddings.position_embedding.weight", "embeddings.class_embedding"
    names = [table, vector]
    tuned = changed(tmp_path / "base", tmp_path / "tuned", *names)
    report = extract(tmp_path / "base", tuned, tmp_path / "back", rank=4, save_rest=True)
    (left,) = report.left_over
    assert left.tensor == names[1]
    assert not left.saved
    assert "embeddings, and that holds " in left.reason
    assert names[1] in report.warnings[0]


def test_nothing_that_peft_can_save_is_refused_with_the_reason(mine: Path, tmp_path: Path) -> None:
    tuned = changed(mine, tmp_path / "tuned", "scale")
    with pytest.raises(UnsupportedError, match=r"scale; .*no module that PEFT could save"):
        extract(mine, tuned, tmp_path / "back", save_rest=True)
