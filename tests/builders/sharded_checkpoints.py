"""Fixtures of sharded checkpoints, and what they are compared with."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from conformance.making import quiet
from terminal import ROOT

from fixtures.generators import sharded

if TYPE_CHECKING:
    from pathlib import Path


SHARDED = ROOT / "fixtures" / "sharded"
CHECKPOINTS = ("dcp", "shards", "zero2", "zero3")
Tensors = dict[str, torch.Tensor]


def save(state: dict[str, Any], folder: Path) -> Path:
    with quiet():
        dcp.save(state, checkpoint_id=folder)
    return folder


def truth() -> Tensors:
    return {
        name: torch.tensor(sharded.values(name)).reshape(shape)
        for name, shape in sharded.SHAPES.items()
    }


def copied(name: str, folder: Path) -> Path:
    shutil.copytree(SHARDED / name, folder / name)
    return folder / name if name in {"dcp", "shards"} else folder / name / "global_step1"
