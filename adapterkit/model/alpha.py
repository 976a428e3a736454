"""The alpha that an adapter holds, whatever its format states: a scale times a rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adapterkit.model.sources import PeftSource

if TYPE_CHECKING:
    from adapterkit.model.adapter import AdapterTensorSet


def stated_alphas(adapter: AdapterTensorSet) -> tuple[float, ...]:
    """Return the different numerators of its scales; PEFT's config states one for all modules."""
    if isinstance(adapter.source, PeftSource):
        stated = adapter.source.config.get("lora_alpha")
        if isinstance(stated, (int, float)) and not isinstance(stated, bool):
            return (float(stated),)
    found = {pair.scale * pair.rank for pair in adapter.pairs() if pair.sound and pair.rank}
    return tuple(sorted(each for each in found if math.isfinite(each)))
