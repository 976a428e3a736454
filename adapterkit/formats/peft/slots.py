"""PEFT 0.1 and 0.2's `enable_lora`: a fused layer of which some slots are adapted.

As loralib's MergedLinear: A holds r rows for each enabled slot, B is the weight of a convolution
(rows of the enabled slots, r, 1) with a group for each of them. In full the update has the rank of
all slots together, and rows of zeros where a slot is left out; its scale stays alpha / r.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import FormatError
from adapterkit.keys import Role, TensorKey
from adapterkit.tables import FLAG, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from adapterkit.lora_config.config import LoraConfig
    from adapterkit.tensor import LazyTensor

SETTINGS = ("enable_lora", "merge_weights")
_CONVOLUTION, _MOST_SLOTS = 3, 64


def spelled_out(
    tensors: Mapping[TensorKey, LazyTensor], config: LoraConfig
) -> tuple[dict[TensorKey, LazyTensor], tuple[str, ...]]:
    """Return the tensors with B of every fused layer in full, and the modules that have one.

    Raises:
        FormatError: if the factors are not those of the enabled slots.
    """
    full = dict(tensors)
    enabled = config.fields.optional("enable_lora", listed(FLAG, _MOST_SLOTS)) or ()
    modules: list[str] = []
    for key, b in tensors.items() if any(enabled) else ():
        a = tensors.get(TensorKey(key.module, Role.LORA_A))
        if key.role is not Role.LORA_B or len(b.shape) != _CONVOLUTION or a is None:
            continue
        slots = [place for place, used in enumerate(enabled) if used]
        rows, rank, kernel = b.shape
        if kernel != 1 or rows % len(slots) or a.shape[:1] != (rank * len(slots),):
            raise FormatError(
                f"A {list(a.shape)} and B {list(b.shape)} are not those of {len(slots)} of "
                f"{len(enabled)} slots (enable_lora)",
                path=config.path,
                where=key.module,
            )
        modules.append(key.module)
        height = rows // len(slots)
        full[key] = _in_full(b, slots, (height * len(enabled), rank * len(slots)))
    return full, tuple(modules)


def _in_full(b: LazyTensor, slots: list[int], shape: tuple[int, int]) -> LazyTensor:
    height, rank = b.shape[0] // len(slots), b.shape[1]

    def placed(stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        import numpy as np

        whole = np.zeros(shape, stored.dtype)
        for group, slot in enumerate(slots):
            block = stored[group * height : (group + 1) * height, :, 0]
            columns = slice(group * rank, (group + 1) * rank)
            whole[slot * height : (slot + 1) * height, columns] = block
        return whole

    return b.map(placed, shape=shape)
