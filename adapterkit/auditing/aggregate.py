"""From modules to families, layers and the adapter as a whole."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.auditing.metrics import quantile
from adapterkit.auditing.report import AuditSummary, FamilyAudit, LayerShare

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adapterkit.auditing.report import ModuleAudit

_Number = TypeVar("_Number", int, float)


def summarise(modules: Sequence[ModuleAudit], layers: Sequence[LayerShare]) -> AuditSummary:
    """Return the adapter as a whole."""
    trained = [module for module in modules if module.state == "trained"]
    energy = sum(module.frobenius_norm**2 for module in modules)
    quantiles: dict[str, Any] = {
        f"energy_rank_{level}_p{part}": _quantile(trained, f"energy_rank_{level}", part / 100)
        for level in (90, 95, 99)
        for part in (50, 90)
    }
    means: dict[str, Any] = {
        f"{name}_mean": _mean(trained, name)
        for name in (
            "stable_rank",
            "effective_rank",
            "effective_rank_energy",
            "participation_ratio",
            "utilization",
            "top1_energy",
            "spectral_norm",
            "frobenius_norm",
            "entropy",
        )
    }
    return AuditSummary(
        modules=len({module.module for module in modules}),
        updates=len(modules),
        untrained=len(modules) - len(trained),
        parameters=sum(module.parameters for module in modules),
        ranks=_range(module.rank for module in modules),
        scales=_range(module.scale for module in modules),
        stable_rank_median=_quantile(trained, "stable_rank", 0.5),
        stable_rank_weighted_mean=_weighted_mean(trained),
        spectral_norm_max=max((module.spectral_norm for module in trained), default=None),
        frobenius_norm=energy**0.5,
        energy=energy,
        rms_median=_quantile(trained, "rms", 0.5),
        concentration_index=_herfindahl(layer.energy_share for layer in layers),
        concentration_index_by_size=_herfindahl(layer.mean_square_share for layer in layers),
        **means,
        **quantiles,
    )


def layer_shares(modules: Sequence[ModuleAudit]) -> tuple[LayerShare, ...]:
    """Return every layer's part of the update; what is outside of layers comes last."""
    groups: defaultdict[tuple[str, int | None], list[ModuleAudit]] = defaultdict(list)
    for module in modules:
        groups[module.stack, module.layer].append(module)
    energies = {key: sum(m.frobenius_norm**2 for m in group) for key, group in groups.items()}
    squares = {
        key: energies[key] / sum(m.shape[0] * m.shape[1] for m in group)
        for key, group in groups.items()
    }
    energy, square = sum(energies.values()), sum(squares.values())
    ordered = sorted(groups, key=lambda key: (key[1] is None, key[0], key[1] or 0))
    return tuple(
        LayerShare(
            stack=key[0],
            layer=key[1],
            updates=len(groups[key]),
            energy=energies[key],
            energy_share=energies[key] / energy if energy else None,
            mean_square_share=squares[key] / square if square else None,
        )
        for key in ordered
    )


def families_of(modules: Sequence[ModuleAudit]) -> tuple[FamilyAudit, ...]:
    """Return one row for each kind of module, in file order."""
    groups: defaultdict[str, list[ModuleAudit]] = defaultdict(list)
    for module in modules:
        groups[module.family].append(module)
    total = sum(module.frobenius_norm**2 for module in modules)
    return tuple(_family(name, group, total) for name, group in groups.items())


def _family(name: str, group: Sequence[ModuleAudit], total: float) -> FamilyAudit:
    trained = [module for module in group if module.state == "trained"]
    energy = sum(module.frobenius_norm**2 for module in group)
    return FamilyAudit(
        family=name,
        updates=len(group),
        untrained=len(group) - len(trained),
        ranks=_range(module.rank for module in group),
        scales=_range(module.scale for module in group),
        parameters=sum(module.parameters for module in group),
        energy_share=energy / total if total else None,
        stable_rank_median=_quantile(trained, "stable_rank", 0.5),
        effective_rank_median=_quantile(trained, "effective_rank", 0.5),
        energy_rank_90_median=_quantile(trained, "energy_rank_90", 0.5),
        energy_rank_99_median=_quantile(trained, "energy_rank_99", 0.5),
        rms_median=_quantile(trained, "rms", 0.5),
        spectral_norm_max=max((module.spectral_norm for module in trained), default=None),
    )


def _range(values: Iterable[_Number]) -> tuple[_Number, _Number]:
    listed = list(values)
    return min(listed), max(listed)


def _values(modules: Sequence[ModuleAudit], name: str) -> list[float]:
    values = (getattr(module, name) for module in modules)
    return [value for value in values if value is not None]


def _mean(modules: Sequence[ModuleAudit], name: str) -> float | None:
    values = _values(modules, name)
    return math.fsum(values) / len(values) if values else None


def _quantile(modules: Sequence[ModuleAudit], name: str, part: float) -> float | None:
    values = _values(modules, name)
    return quantile(values, part) if values else None


def _weighted_mean(trained: Sequence[ModuleAudit]) -> float | None:
    weights = sum(module.parameters for module in trained)
    weighted = sum((module.stable_rank or 0.0) * module.parameters for module in trained)
    return weighted / weights if weights else None


def _herfindahl(shares: Iterable[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(share**2 for share in known) if known else None
