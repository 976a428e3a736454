"""Findings about the numbers: what is not finite, what does nothing, what will not fit f16.

Every tensor is read once, in float32, for its Gram matrix: its diagonal bounds every element and
shows NaN and infinity, and tr(BᵀB · AAᵀ) is ‖BA‖². Where that is in doubt, float64 decides.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adapterkit.checks.findings import Finding, Severity, named
from adapterkit.dtype import DType
from adapterkit.errors import UncheckableError
from adapterkit.keys import Role
from adapterkit.lowrank.differences import all_finite, norm
from adapterkit.lowrank.effect import acts, idle
from adapterkit.tensor import LazyTensor
from adapterkit.work import tracked

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from adapterkit.model import AdapterTensorSet, Update

    Array = np.ndarray[Any, np.dtype[np.float32]]

# What changes a module without its factors.
_BESIDE = frozenset({Role.MAGNITUDE, Role.COLUMN_MAGNITUDE, Role.LORA_BIAS})
_F16_LARGEST = 65504.0
# ‖ΔW‖ of a trained module is a few units at most; a weight's own norm is of the order of 100.
_ABSURD = 1e4
# Below this share of ‖A‖‖B‖ the rounding of float32 may be all that is left.
_DOUBTFUL = 1e-2
# Elements that are widened to float32 at a time.
_BLOCK = 1 << 18


def check_values(adapter: AdapterTensorSet) -> Iterator[Finding]:
    """Yield every finding about values."""
    silent: list[str] = []
    paired = {key for pair in adapter.pairs() if _numeric(pair) for key in pair.keys}
    for key, tensor in adapter.tensors.items():
        if key not in paired and tensor.dtype.floating and tensor.size and not all_finite(tensor):
            yield _not_finite(str(key))
    for pair in tracked(list(adapter.pairs())):
        if not _numeric(pair):
            continue
        # One factor in memory after the other: the second takes the place of the first.
        gram = _gram(pair.wide(LazyTensor.numpy), pair.a.dtype, wide=True)
        grams = gram, _gram(pair.tall(LazyTensor.numpy), pair.b.dtype, wide=False)
        broken = [
            _not_finite(str(key))
            for key, gram, factor in zip(pair.keys, grams, (pair.a, pair.b), strict=True)
            if not math.isfinite(_trace(gram)) and not all_finite(factor)
        ]
        yield from broken
        if not broken:
            try:
                size = _norm(pair, *grams)
            except UncheckableError as error:
                yield Finding("AK203", Severity.WARNING, (pair.module,), error.message)
                continue
            silent += [pair.module] if size == 0 else []
            yield from _sizes(pair, size, grams)
    yield from _silent(adapter, silent)


def _not_finite(name: str) -> Finding:
    hint = "retrain, or take an earlier checkpoint"
    return Finding("AK201", Severity.ERROR, named(name), "holds NaN or infinity", hint)


def _sizes(pair: Update, size: float, grams: tuple[Array, Array]) -> Iterator[Finding]:
    if size > _ABSURD:
        message = f"its update has norm {size:.3g}, far above any trained one"
        yield Finding("AK203", Severity.WARNING, (pair.module,), message)
    for word, factor, gram in zip("AB", (pair.a, pair.b), grams, strict=True):
        # No element is larger than the root of the sum of all squares.
        trace = _trace(gram)
        if math.isfinite(trace) and trace <= _F16_LARGEST**2:
            continue
        if (largest := _largest(factor)) > _F16_LARGEST:
            message = f"{word} reaches {largest:.3g}, which overflows float16"
            hint = "convert with --outtype f32 or bf16"
            yield Finding("AK204", Severity.WARNING, (pair.module,), message, hint)


def _silent(adapter: AdapterTensorSet, modules: list[str]) -> Iterator[Finding]:
    if idle(adapter, lambda pair: pair.module in modules):
        hint = "it is untrained, or was saved before the weights were gathered"
        yield Finding("AK202", Severity.ERROR, (), "no module has an update", hint)
        return
    beside = {key.module: key for key in adapter.tensors if key.role in _BESIDE}
    for module in modules:
        acting = module in beside and acts(adapter, beside[module])
        message = f"B · A is zero: only its {beside[module].role.value} can act" if acting else ""
        yield Finding("AK205", Severity.WARNING, (module,), message or "its update is zero")


def _numeric(pair: Update) -> bool:
    return bool(
        pair.sound
        and pair.a.size
        and pair.b.size
        and pair.a.dtype.floating
        and pair.b.dtype.floating
    )


def _norm(pair: Update, a: Array, b: Array) -> float:
    import numpy as np

    bound = math.sqrt(_trace(a)) * math.sqrt(_trace(b)) * abs(pair.scale)
    with np.errstate(invalid="ignore"):
        square = float(np.sum(a.astype(np.float64) * b))
    value = math.sqrt(max(square, 0.0)) * abs(pair.scale)
    if math.isfinite(bound) and value > _DOUBTFUL * bound:
        return value
    return norm(pair)


def _gram(stack: np.ndarray[Any, Any], dtype: DType, *, wide: bool) -> Array:
    """Return A·Aᵀ of wide factors (E, r, in), Bᵀ·B of tall ones (E, out, r), as (E, r, r)."""
    import numpy as np

    rank = stack.shape[1 if wide else 2]
    total = np.zeros((len(stack), rank, rank), np.float32)
    step = max(1, _BLOCK // max(1, rank))
    with np.errstate(all="ignore"):
        for place, matrix in enumerate(stack):
            for start in range(0, matrix.shape[1 if wide else 0], step):
                cut = slice(start, start + step)
                part = _widened(matrix[:, cut] if wide else matrix[cut], dtype)
                total[place] += part @ part.T if wide else part.T @ part
    return total


def _widened(values: np.ndarray[Any, Any], dtype: DType) -> Array:
    import numpy as np

    if dtype is DType.BF16:  # ml_dtypes' own conversion is ten times slower
        bits = values.view(np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return values.astype(np.float32)


def _trace(gram: Array) -> float:
    import numpy as np

    with np.errstate(all="ignore"):
        return float(np.trace(gram, axis1=1, axis2=2, dtype=np.float64).sum())


def _largest(tensor: LazyTensor) -> float:
    import numpy as np

    value = float(np.max(np.abs(tensor.numpy().astype(np.float64))))
    return value if math.isfinite(value) else 0.0
