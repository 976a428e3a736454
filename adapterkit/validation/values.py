"""Findings about the numbers: what is not finite, what does nothing, what will not fit f16."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adapterkit.delta import all_finite, norm
from adapterkit.validation.findings import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.model import AdapterTensorSet, LoraPair
    from adapterkit.tensor import LazyTensor

_MATRIX = 2
_F16_LARGEST = 65504.0
# ‖ΔW‖ of a trained module is a few units at most; a weight's own norm is of the order of 100.
_ABSURD = 1e4


def check_values(adapter: AdapterTensorSet) -> Iterator[Finding]:
    """Yield every finding about values; each tensor is read once or twice, one at a time."""
    silent: list[str] = []
    count = 0
    broken: set[str] = set()
    for key, tensor in adapter.tensors.items():
        if tensor.dtype.floating and tensor.size and not all_finite(tensor):
            broken.add(key.module)
            hint = "retrain, or take an earlier checkpoint"
            message = "holds NaN or infinity"
            yield Finding("AK201", Severity.ERROR, str(key), message, hint)
    for pair in adapter.pairs():
        if pair.module in broken or not _sound(pair):
            continue
        count += 1
        size = norm(pair)
        if size == 0:
            silent.append(pair.module)
        elif size > _ABSURD:
            message = f"its update has norm {size:.3g}, far above any trained one"
            yield Finding("AK203", Severity.WARNING, pair.module, message)
        for word, factor in (("A", pair.a), ("B", pair.b)):
            if (largest := _largest(factor)) > _F16_LARGEST:
                message = f"{word} reaches {largest:.3g}, which overflows float16"
                hint = "convert with --outtype f32 or bf16"
                yield Finding("AK204", Severity.WARNING, pair.module, message, hint)
    yield from _silent(silent, count)


def _silent(modules: list[str], count: int) -> Iterator[Finding]:
    if modules and len(modules) == count:
        hint = "it is untrained, or was saved before the weights were gathered"
        yield Finding("AK202", Severity.ERROR, None, "no module has an update", hint)
        return
    for module in modules:
        yield Finding("AK205", Severity.WARNING, module, "its update is zero")


def _sound(pair: LoraPair) -> bool:
    shaped = len(pair.a.shape) >= _MATRIX and len(pair.b.shape) >= _MATRIX
    return bool(
        shaped
        and pair.a.size
        and pair.b.size
        and pair.a.shape[-2] == pair.b.shape[-1]
        and pair.a.shape[:-2] == pair.b.shape[:-2]
        and pair.a.dtype.floating
        and pair.b.dtype.floating
    )


def _largest(tensor: LazyTensor) -> float:
    import numpy as np

    value = float(np.max(np.abs(tensor.numpy().astype(np.float32))))
    return value if math.isfinite(value) else 0.0
