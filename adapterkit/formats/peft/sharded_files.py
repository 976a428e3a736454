"""Which paths mean a sharded checkpoint, and where the config of its adapter lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.containers.folders import dcp_folder, shards_folder, step_folder
from adapterkit.formats.peft.files import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

# A run's own folder, that of a checkpoint in it, and that of the data in this.
_LEVELS = 3


def is_dcp(path: Path) -> bool:
    """Tell whether a path means a checkpoint of torch, and no adapter saved by PEFT."""
    if _has_weights(path):
        return False
    return dcp_folder(path) is not None or shards_folder(path) is not None


def is_zero(path: Path) -> bool:
    """Tell whether a path means a checkpoint of DeepSpeed, and no adapter saved by PEFT."""
    return not _has_weights(path) and step_folder(path) is not None


def config_above(folder: Path) -> Path | None:
    """Return the adapter_config.json of a run, which lies beside its checkpoint or above."""
    places = (folder, *folder.absolute().parents)[:_LEVELS]
    return next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)


def _has_weights(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in WEIGHTS)
