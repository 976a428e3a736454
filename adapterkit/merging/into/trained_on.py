"""What a base's weights differ by from the quantised ones that an adapter was trained on.

QLoRA trains an adapter beside decoded weights of 4 bits; merged into the 16-bit original it meets
others. Where both are at hand, the report says by how much: ‖W - W₄‖ beside ‖ΔW‖.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.base.places import Places
from adapterkit.base.quantised import decoded
from adapterkit.base.recorded import recorded_base
from adapterkit.base.schemes import Scheme, quantisation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.merging.into.report import TensorReport
    from adapterkit.merging.planning import Source
    from adapterkit.tensor import LazyTensor

# Elements of a block of rows.
_BLOCK = 1 << 20


def beside_trained(
    tensors: Sequence[TensorReport], sources: Sequence[Source], base: BaseModel
) -> tuple[list[TensorReport], list[str]]:
    """Return the reports with the distance to the weights trained on, and a sentence about it.

    Args:
        tensors: what was changed.
        sources: the adapters; the first whose quantised base is at hand counts.
        base: what was merged into, not quantised.

    Raises:
        FormatError: if a file of the quantised base is malformed.
    """
    for source in sources:
        trained, _ = recorded_base(source.adapter, original=False)
        scheme = quantisation(trained) if trained and trained.has_tensors else None
        if trained is not None and isinstance(scheme, Scheme):
            places = Places(decoded(trained, scheme).base)
            found = [_measured(tensor, base, places) for tensor in tensors]
            return found, _said(found, f"{source.adapter.base.name} ({scheme.name})")
    return list(tensors), []


def _measured(tensor: TensorReport, base: BaseModel, places: Places) -> TensorReport:
    name = places.find(tensor.tensor)
    mine = base.tensors.get(tensor.tensor)
    if name is None or mine is None or places.base.tensors[name].shape != mine.shape:
        return tensor
    return replace(tensor, quantised=_distance(mine, places.base.tensors[name]))


def _distance(mine: LazyTensor, theirs: LazyTensor) -> float | None:
    """Return ‖W - W₄‖ / ‖W‖, Frobenius, summed in float64; None where W is zero."""
    width = mine.shape[-1] if mine.shape else 1
    rows, step = mine.size // max(width, 1), max(1, _BLOCK // max(width, 1))
    apart = norm = 0.0
    for begin in range(0, rows, step):
        part = [t.rows(begin, min(begin + step, rows)).numpy() for t in (mine, theirs)]
        here, there = (values.astype(np.float64) for values in part)
        apart += float(np.square(here - there).sum())
        norm += float(np.square(here).sum())
    return (apart / norm) ** 0.5 if norm else None


def _said(tensors: Sequence[TensorReport], name: str) -> list[str]:
    ratios = [
        (tensor.quantised / tensor.relative_norm, tensor.tensor)
        for tensor in tensors
        if tensor.quantised is not None and tensor.relative_norm
    ]
    if not ratios:
        return []
    most, where = max(ratios)
    message = (
        f"the adapter was trained on {name}, whose weights are others: ‖W - W₄‖ is "
        f"{median(ratio for ratio, _ in ratios):.3g} times ‖ΔW‖ at the median of {len(ratios)} "
        f"tensors, at most {most:.3g} times, in {where}; merge into that one with --dequantize for "
        "the weights that it was trained beside"
    )
    return [message]
