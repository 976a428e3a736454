"""One rank and one scale for all modules, for engines that read one of each."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.factors import padded, with_scale
from adapterkit.keys import Role, TensorKey
from adapterkit.model import PeftSource, Source
from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.model import AdapterTensorSet
    from adapterkit.tensor import LazyTensor

# LoraConfig fields that some engines do not read, and what stands for plain LoRA.
_PLAIN: Mapping[str, Any] = {
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": None,
}


def uniform(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the same updates with one rank and one scale, for engines that read one of each.

    Smaller ranks are padded with zeros; the rest of a module's scale goes into its B, which becomes
    float32 unless the factor is a power of two.
    """
    del context
    pairs = list(adapter.pairs())
    if not pairs:
        return Passed(adapter)
    rank = max(pair.rank for pair in pairs)
    scales = Counter(pair.scale for pair in pairs if pair.scale)
    scale = scales.most_common(1)[0][0] if scales else 1.0
    ready = [padded(with_scale(pair, scale), rank) for pair in pairs]
    biases: dict[TensorKey, LazyTensor] = {}
    for pair in pairs:
        key = TensorKey(pair.module, Role.LORA_BIAS)
        if key in adapter.tensors and pair.scale != scale:  # it is scaled like B
            biases[key] = _multiplied(adapter.tensors[key], pair.scale / scale)
    changed = adapter.updated(ready, biases)
    return Passed(changed.replace(source=_without_patterns(adapter.source)))


def _multiplied(tensor: LazyTensor, factor: float) -> LazyTensor:
    return tensor.map(lambda x: x.astype("float64") * factor, dtype=DType.F32)


def _without_patterns(source: Source | None) -> Source | None:
    return PeftSource({**source.config, **_PLAIN}) if isinstance(source, PeftSource) else source
