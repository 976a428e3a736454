"""Which paths hold PEFT's tensors without the config that scales them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapterkit.containers.safetensors import read_safetensors
from adapterkit.errors import AdapterKitError, UnsupportedError
from adapterkit.formats.peft.files import CONFIG, WEIGHTS, stored_tensors
from adapterkit.formats.peft.state import FACTOR
from adapterkit.lora_config.own import KEY

if TYPE_CHECKING:
    from pathlib import Path

_OURS = re.compile(r"(?:^|\.)base_model\.model\..+\.lora_(?:A|embedding_A)(?:\.|$)")
_INDEX = ".safetensors.index.json"
_WHOLE = ("*-of-*.safetensors", "model.safetensors")


def is_weights(path: Path) -> bool:
    """Tell whether a path holds factors by PEFT's names, all of a file or the first of a folder."""
    weights = weights_of(path)
    if weights is None:
        return False
    known = (weights.parent / CONFIG).exists()
    if path.is_dir() and weights.name in WEIGHTS and not known:
        return True
    try:
        # Of shards one is enough, and others may be missing.
        one = read_safetensors if weights.suffix == ".safetensors" else stored_tensors
        stored = one(weights)
        if KEY in stored.metadata:
            return any(FACTOR.search(f".{name}") for name in stored.tensors)
        return not known and any(_OURS.search(name) for name in stored.tensors)
    except UnsupportedError:
        return True  # it has factors, and its reader says what is wrong
    except AdapterKitError:
        return False


def weights_of(path: Path) -> Path | None:
    """Return the weights file that a path means: itself, or the one in a directory."""
    if path.is_file():
        return weights_of(path.parent) if path.name.endswith(_INDEX) else path
    if not path.is_dir():
        return None
    named = (path / name for name in WEIGHTS)
    found = next((file for file in named if file.is_file()), None)
    shards = (file for pattern in _WHOLE for file in sorted(path.glob(pattern)))
    return found or next((file for file in shards if file.is_file()), None)
