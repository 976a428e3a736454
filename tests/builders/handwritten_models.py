"""Small models with hand-written LoRA, and what they are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel
from torch import nn

import adapterkit

if TYPE_CHECKING:
    from pathlib import Path


IN, OUT, VOCAB, RANK = 8, 12, 20, 2


def in_peft(source: Path, model: nn.Module, folder: Path, **options: object) -> nn.Module:
    """Convert a file to PEFT and put it on a plain model."""
    adapterkit.convert(source, folder, **options)
    config = LoraConfig.from_pretrained(folder)
    config.task_type = None
    return PeftModel.from_pretrained(model, folder, config=config).base_model.model


def same(first: torch.Tensor, second: torch.Tensor) -> None:
    assert torch.allclose(first, second, atol=1e-5), (first - second).abs().max()


TOKENS = torch.tensor([[1, 2, 3, 19, 0]])
