"""What tests of torch's files share."""

from __future__ import annotations

from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HOSTILE = ROOT / "fixtures/hostile/torch_zip"


def saved(value: object, path: Path, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


def bits(tensor: torch.Tensor) -> bytes:
    # Not contiguous(): it keeps the odd stride of an axis of size 1, which view() then refuses.
    dense = torch.clone(tensor.detach(), memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()
