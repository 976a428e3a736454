"""Modules that stand out of their family: robust z-scores with the trend over depth removed."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.auditing.metrics import quantile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.auditing.report import ModuleAudit
    from adapterkit.lowrank.products import Array

# Fewer members say little of what is usual among them.
_FAMILY = 16
# Iglewicz and Hoaglin 1993: what lies further out is worth a look.
NOTABLE = 3.5
_MAD_OF_NORMAL = 1.4826
_RELATIVE_ZERO = 1e-9


def with_scores(modules: Sequence[ModuleAudit]) -> list[ModuleAudit]:
    """Return the modules with their z-scores filled in, in the same order."""
    families: defaultdict[str, list[int]] = defaultdict(list)
    for index, module in enumerate(modules):
        if module.state == "trained" and module.rms:
            families[module.family].append(index)
    scored = list(modules)
    for members in families.values():
        if len(members) < _FAMILY:
            continue
        rows = [modules[index] for index in members]
        depth = np.array([row.layer or 0 for row in rows], dtype=np.float64)
        rms = robust_z(np.array([math.log(row.rms) for row in rows]), depth, spread=1.0)
        stable = robust_z(np.array([row.stable_rank for row in rows], dtype=np.float64), depth)
        top = robust_z(np.array([row.row_top8 for row in rows], dtype=np.float64), depth)
        for place, index in enumerate(members):
            scored[index] = replace(
                modules[index],
                rms_z=rms[place],
                stable_rank_z=stable[place],
                row_top8_z=top[place],
            )
    return scored


def robust_z(values: Array, depth: Array, *, spread: float | None = None) -> list[float | None]:
    """Return (x - median) / (1.4826 · MAD) of the residuals of a Theil-Sen line over depth.

    Args:
        values: (n,) the metric.
        depth: (n,) number of the layer.
        spread: size of differences against which a MAD is zero; by default the largest |x|.

    Returns:
        n scores; all None if the residuals do not spread.
    """
    residuals = values - _slope(values, depth) * depth
    residuals = residuals - _median(residuals)
    deviation = _MAD_OF_NORMAL * _median(np.abs(residuals))
    if deviation <= _RELATIVE_ZERO * (spread or float(np.abs(values).max())):
        return [None] * len(values)
    return [float(z) for z in residuals / deviation]


def _slope(values: Array, depth: Array) -> float:
    """Return the median slope between any two layers' medians (Theil 1950, Sen 1968)."""
    layers = np.array(sorted(set(depth.tolist())))
    if len(layers) == len(depth):
        medians = values[np.argsort(depth)]
    else:
        medians = np.array([_median(values[depth == layer]) for layer in layers])
    first, second = np.triu_indices(len(layers), 1)
    if not len(first):
        return 0.0
    return _median((medians[second] - medians[first]) / (layers[second] - layers[first]))


def _median(values: Array) -> float:
    return quantile(values.tolist(), 0.5)


def notable(modules: Sequence[ModuleAudit], count: int = 5) -> list[tuple[ModuleAudit, str, float]]:
    """Return the modules that stand out most, each with its metric and z; none below `NOTABLE`."""
    found: list[tuple[ModuleAudit, str, float]] = []
    for module in modules:
        scores = {
            "rms": module.rms_z,
            "stable rank": module.stable_rank_z,
            "top-8 rows": module.row_top8_z,
        }
        metric, score = max(
            ((name, z) for name, z in scores.items() if z is not None),
            key=lambda item: abs(item[1]),
            default=("", 0.0),
        )
        if abs(score) >= NOTABLE:
            found.append((module, metric, score))
    found.sort(key=lambda item: -abs(item[2]))
    return found[:count]
