"""Where the files of checkpoints of several files lie, told by their names alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# torch.distributed.checkpoint: a pickled index, and the data of the ranks.
INDEX, DATA_SUFFIX = ".metadata", ".distcp"
_PICKLE = b"\x80"
# Its HuggingFaceStorageWriter: the files of each rank.
RANK_SHARD = re.compile(
    r"shard-(?P<rank>\d{5})-model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors"
)
_RANK_SHARDS = "shard-*-model-*-of-*.safetensors"
# As accelerate names the model's checkpoint, which lies beside the optimizer's.
_MODEL_FOLDER = "pytorch_model_fsdp_*"
# DeepSpeed: the model's names and shapes, and the fp32 masters.
MODEL, OPTIMIZER = "_model_states.pt", "_optim_states.pt"
_STEP = re.compile(r"[\w.-]{1,200}")


def dcp_folder(path: Path) -> Path | None:
    """Return the directory of a checkpoint of torch that a path means, None if it means none.

    The path is that directory, a file of it, or a directory that holds one such.
    """
    if path.is_file():
        own = path.name == INDEX or path.suffix == DATA_SUFFIX
        return path.parent if own and _holds_dcp(path.parent) else None
    if not path.is_dir():
        return None
    if _holds_dcp(path):
        return path
    for pattern in (_MODEL_FOLDER, "*/"):
        if found := [child for child in sorted(path.glob(pattern)) if _holds_dcp(child)]:
            return found[0] if len(found) == 1 else None
    return None


def shards_folder(path: Path) -> Path | None:
    """Return the directory of the safetensors shards of ranks that a path means, or None.

    The path is that directory, a shard, or a directory that holds one such and no tensors itself.
    """
    if path.is_file():
        return path.parent if RANK_SHARD.fullmatch(path.name) else None
    if not path.is_dir():
        return None
    if any(path.glob(_RANK_SHARDS)):
        return path
    found = [child for child in sorted(path.glob("*/")) if any(child.glob(_RANK_SHARDS))]
    alone = len(found) == 1 and not any(path.glob("*.safetensors"))
    return found[0] if alone else None


def _holds_dcp(folder: Path) -> bool:
    index = folder / INDEX
    if not index.is_file():
        return False
    with index.open("rb") as file:
        return file.read(1) == _PICKLE


def step_folder(path: Path) -> Path | None:
    """Return the directory of the files of a step that a path means, None if it means none.

    The path is that directory, a file of it, or the directory above with `latest` or one step.
    """
    if path.is_file():
        return path.parent if path.name.endswith((MODEL, OPTIMIZER)) else None
    if not path.is_dir():
        return None
    if any(path.glob(f"*{MODEL}")):
        return path
    steps = [child for child in sorted(path.glob("*/")) if any(child.glob(f"*{MODEL}"))]
    if (latest := path / "latest").is_file():
        with latest.open("rb") as file:
            name = file.read(256).decode("utf-8", "replace").strip()
        named = path / name
        return named if _STEP.fullmatch(name) and named in steps else None
    return steps[0] if len(steps) == 1 else None
