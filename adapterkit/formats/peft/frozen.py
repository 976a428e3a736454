"""Whole state dicts: what training saved of the frozen base beside the adapter is no part of it.

A state dict is whole where every adapted module lies in it with its frozen weight. Then only what
the config says was trained is the adapter's: modules to save and biases.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapterkit.keys import FACTORS, Role, TensorKey
from adapterkit.tables import TEXT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.lora_config.config import LoraConfig
    from adapterkit.tensor import LazyTensor

_IN_BLOCK = re.compile(r"\.\d+\.")


def without_frozen(
    tensors: Mapping[TensorKey, LazyTensor], config: LoraConfig
) -> tuple[dict[TensorKey, LazyTensor], list[str]]:
    """Return the tensors of the adapter, and a note on those of the base that lay beside them."""
    # PEFT itself saves a copy of an adapted embedding or output, and of nothing in a block.
    adapted = {k.module for k in tensors if k.role in FACTORS and _IN_BLOCK.search(k.module)}
    if not adapted or not all(TensorKey(each, Role.BASE_COPY) in tensors for each in adapted):
        return dict(tensors), []
    kept = {key: x for key, x in tensors.items() if not _frozen(key, adapted, config)}
    count = len(tensors) - len(kept)
    note = f"{count} tensors left out: the frozen base model, saved whole beside the adapter"
    return kept, [note]


def _frozen(key: TensorKey, adapted: set[str], config: LoraConfig) -> bool:
    if key.role is Role.BASE_COPY:
        return key.module in adapted
    if key.role is not Role.FULL:
        return False
    module, _, parameter = key.module.rpartition(".")
    biases = config.fields.optional("bias", TEXT) or "none"
    if parameter == "bias" and biases != "none":
        return biases == "lora_only" and module not in adapted
    saved = config.names("modules_to_save")
    return not any(f".{name}." in f".{module}." for name in saved)
