"""Settings of a LoraConfig that change what its tensors mean, as fields of the neutral model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from adapterkit.lora_config.config import BASE_CHANGING_INITS
from adapterkit.tables import whole

if TYPE_CHECKING:
    from adapterkit.lora_config.config import LoraConfig


_LARGEST_GROUP = 1 << 12


def meaning(config: LoraConfig) -> dict[str, Any]:
    """Return fields of AdapterTensorSet; the config has checked their types."""
    init = config.raw.get("init_lora_weights")
    changes = isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS)
    indices = config.raw.get("trainable_token_indices") or ()
    tokens: Any = tuple(cast("list[int]", indices))
    if isinstance(indices, Mapping):
        rows = cast("Mapping[str, list[int]]", indices)
        tokens = {module: tuple(numbers) for module, numbers in rows.items()}
    group = config.fields.get("qalora_group_size", whole(1, _LARGEST_GROUP), 16)
    ranges = cast("list[list[int]]", config.raw.get("layer_replication") or [])
    return {
        "initialisation": init if changes else None,
        "layer_replication": tuple(tuple(each) for each in ranges),
        "invocation_tokens": tuple(config.raw.get("alora_invocation_tokens") or ()),
        "token_indices": tokens,
        "pooled_inputs": group if config.flag("use_qalora") else 0,
    }
