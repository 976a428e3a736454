"""Fixtures of sharded checkpoints, and what they are compared with."""

from __future__ import annotations

import shutil
from collections import OrderedDict
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


def zero(
    folder: Path,
    tensors: Tensors,
    stage: int,
    *,
    ranks: int,
    groups: int = 1,
    padding: int = 0,
    buckets: int = 1,
) -> Path:
    """Save tensors as DeepSpeed parts them, with torch."""
    folder.mkdir(parents=True)
    items = list(tensors.items())
    size = -(-len(items) // groups)
    parted = [OrderedDict(items[at : at + size]) for at in range(0, len(items), size)]
    model = {
        "module": {name: torch.zeros(0) for name, _ in items},
        "param_shapes": [{name: x.shape for name, x in group.items()} for group in parted],
        "buffer_names": [],
        "shared_params": {},
        "frozen_param_shapes": None,
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        state: dict[str, Any] = {"zero_stage": stage, "partition_count": ranks}
        if stage == 3:
            row = torch.cat([_share(x, rank, ranks) for _, x in items])
            state["fp32_flat_groups"] = list(row.tensor_split(buckets))
        else:
            state["single_partition_of_fp32_groups"] = [
                _flat(group, padding, ranks).tensor_split(ranks)[rank].clone() for group in parted
            ]
            if padding:
                state["param_alignment_paddings"] = [[padding] * len(group) for group in parted]
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, folder / name)
    return folder


def _flat(group: Tensors, padding: int, ranks: int) -> torch.Tensor:
    row = torch.cat([torch.cat([x.reshape(-1), torch.zeros(padding)]) for x in group.values()])
    return torch.cat([row, torch.zeros(-len(row) % (2 * ranks))])


def _share(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    size = -(-tensor.numel() // ranks)
    row = torch.cat([tensor.reshape(-1), torch.zeros(size * ranks - tensor.numel())])
    return row[rank * size : (rank + 1) * size].clone()
