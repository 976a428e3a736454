"""Adapters as PEFT state dicts, for programs that hold them in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np  # noqa: TC002, TID253  (public signatures resolve at run time)

from adapterkit.errors import UsageError
from adapterkit.formats.peft.reader import interpret
from adapterkit.formats.peft.writer import as_peft
from adapterkit.loading import Need, load
from adapterkit.lora_config.config import LoraConfig
from adapterkit.model import AdapterTensorSet
from adapterkit.tensor import LazyTensor

# What messages name in place of a file.
_MEMORY = Path("<state dict>")


def from_state_dict(
    state: Mapping[str, np.ndarray[Any, Any]], config: Mapping[str, Any] | object
) -> AdapterTensorSet:
    """Return the adapter that PEFT tensors and a LoraConfig mean.

    Args:
        state: arrays by PEFT's names, as `get_peft_model_state_dict` gives them; bf16 as ml_dtypes'
            bfloat16. They must not change afterwards.
        config: the LoraConfig, or its fields as `to_dict` gives them.

    Raises:
        FormatError: if two tensors have one meaning or a field is malformed.
        UsageError: if it is given torch tensors, or no config.
        UnsupportedError: if a tensor or setting is something other than a low-rank update.
    """
    for name, value in state.items():
        if type(value).__module__.partition(".")[0] == "torch":
            raise UsageError(
                "is a torch tensor, and this takes numpy arrays; adapterkit.torch.from_state_dict "
                "takes them",
                where=name,
            )
    stored = {name: LazyTensor.of(array) for name, array in state.items()}
    # PEFT keeps names in sets, which its files have as lists.
    fields = {
        name: sorted(cast("set[str]", value)) if isinstance(value, (set, frozenset)) else value
        for name, value in _fields(config).items()
    }
    return interpret(stored, LoraConfig(fields, _MEMORY), _MEMORY)


def _fields(config: object) -> Mapping[str, Any]:
    """Return the fields of a LoraConfig of PEFT's, or what is given as fields."""
    if isinstance(config, Mapping):
        return cast("Mapping[str, Any]", config)
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        raise UsageError(f"config is a {type(config).__name__}; expects a LoraConfig or its fields")
    return to_dict()


def to_state_dict(
    source: AdapterTensorSet | Path | str,
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Return PEFT's tensors, read into memory, and the fields of their LoraConfig.

    Args:
        source: an adapter, or a file or directory of any format.

    Raises:
        FormatError: if it is malformed or broken.
    """
    held = isinstance(source, AdapterTensorSet)
    tensors, config = as_peft(source if held else load(source, need=Need.SOUND).adapter)
    return {name: tensor.numpy() for name, tensor in tensors.items()}, config
