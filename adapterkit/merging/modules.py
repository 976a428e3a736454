"""One module: its factors are read, combined, given a rank, rounded and measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.lowrank.decomposition import EXACT_ZERO, NUMERICAL_ZERO
from adapterkit.lowrank.products import LowRank, nothing, scaled, stored, wide
from adapterkit.lowrank.ranks import RankRule
from adapterkit.merging.combination import Combination, Outcome, combine
from adapterkit.merging.report import ModuleReport
from adapterkit.merging.storing import acting, load, widest
from adapterkit.model import Update

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.lowrank.products import Array
    from adapterkit.merging.planning import ModulePlan


# A sum of weights below this share of their magnitudes is rounding of 0.
_NO_SUM = 1e-12


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for all modules of a merge.

    Attributes:
        how: the method.
        ranks: how the rank is chosen.
        normalize: whether weights are divided by their sum.
        dtype: stored type; None for the widest of the sources'.
        alpha: scale · rank of every merged module, so that a file needs one alpha.
    """

    how: Combination
    ranks: RankRule
    normalize: bool
    dtype: DType | None
    alpha: int


@dataclass(frozen=True, slots=True)
class MergedModule:
    """One merged module, ready to be stored.

    Attributes:
        pair: its factors, rounded.
        report: what was lost.
    """

    pair: Update
    report: ModuleReport


def merge_module(plan: ModulePlan, *, settings: Settings, labels: Sequence[str]) -> MergedModule:
    """Merge one module, experts one by one at a common rank.

    Args:
        plan: the pairs and their weights.
        settings: what holds for all modules.
        labels: what to call each adapter.
    """
    weights = _weights(plan, normalize=settings.normalize)
    columns = [
        load(pair, label) if pair is not None else None
        for pair, label in zip(plan.pairs, labels, strict=True)
    ]
    size = next(len(column) for column in columns if column is not None)
    shape = next(column[0].shape for column in columns if column is not None)
    outcomes: list[Outcome] = []
    for expert in range(size):
        updates = [nothing(shape) if c is None else c[expert] for c in columns]
        try:
            outcomes.append(combine(updates, weights, settings.how, (plan.module, expert)))
        except UnsupportedError as error:
            raise UnsupportedError(error.message, where=plan.module) from None
    return _stored(plan, weights, outcomes, settings)


def _weights(plan: ModulePlan, *, normalize: bool) -> Array:
    weights = np.array(plan.weights)
    if not normalize:
        return weights
    total = float(weights.sum())
    if abs(total) <= _NO_SUM * float(np.abs(weights).sum()):
        raise UsageError(
            f"the weights of {plan.module} sum to 0, and normalize divides by their sum; "
            "leave it out"
        )
    return weights / total


def _stored(
    plan: ModulePlan, weights: Array, outcomes: Sequence[Outcome], settings: Settings
) -> MergedModule:
    spectra = [outcome.spectrum for outcome in outcomes if outcome.spectrum is not None]
    # A rank that was asked for is the rank of all modules: engines that know one rank only can
    # serve the result, and zeros fill what a module does not have.
    limit = settings.alpha
    if settings.ranks.rank is None:
        dense = settings.how.dense and settings.how.tolerance is not None
        limit = plan.largest_rank(dense=dense)
    zero = EXACT_ZERO if _kind(plan, settings.dtype) is DType.F64 else NUMERICAL_ZERO
    rank = settings.ranks.choose(spectra, limit, zero) if spectra else plan.rank
    scale = settings.alpha / rank
    made = [LowRank(*outcome.factors(rank, scale)) for outcome in outcomes]
    exact = outcomes[0].spectrum is None
    pair = _rounded(plan, made, scale, settings.dtype, exact=exact)
    return MergedModule(pair, _report(plan, weights, outcomes, made, pair))


def _rounded(
    plan: ModulePlan, made: Sequence[LowRank], scale: float, dtype: DType | None, *, exact: bool
) -> Update:
    """Return the factors of all experts, turned as the model wants them and rounded once."""
    first, rank = plan.present[0], made[0].rank
    b, a = _stack([each.b for each in made]), _stack([each.a for each in made])
    if first.embedding:
        a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
    a_shape, b_shape = first.factor_shapes(rank)
    a, b = a.reshape(a_shape), b.reshape(b_shape)
    kinds = _dtypes(plan, a, b, dtype, exact=exact)
    return Update(plan.module, stored(a, kinds[0]), stored(b, kinds[1]), scale, first.kind)


def _stack(matrices: Sequence[Array]) -> Array:
    """Return (E, rows, columns); one matrix is not copied for that."""
    return np.stack(matrices) if len(matrices) > 1 else matrices[0][None]


def _kind(plan: ModulePlan, dtype: DType | None) -> DType:
    return dtype or widest([t for pair in plan.present for t in (pair.a, pair.b)])


def _dtypes(
    plan: ModulePlan, a: Array, b: Array, dtype: DType | None, *, exact: bool
) -> tuple[DType, DType]:
    """Return the stored types of A and B.

    Factors that are stored as they are keep their bits; where a weight went into B and the type
    would round the product, B becomes float32.
    """
    if dtype:
        return dtype, dtype
    if not exact:
        return _kind(plan, dtype), _kind(plan, dtype)
    sides = [p.a for p in plan.present], [p.b for p in plan.present]
    kinds = [widest(side) for side in sides]
    kept = [
        kind if np.array_equal(wide(stored(x, kind)), x) else _widened(kind)
        for kind, x in zip(kinds, (a, b), strict=True)
    ]
    return kept[0], kept[1]


def _widened(kind: DType) -> DType:
    """Return float32, or float64 for what is wider already."""
    return kind if kind is DType.F64 else DType.F32


def _report(
    plan: ModulePlan,
    weights: Array,
    outcomes: Sequence[Outcome],
    made: Sequence[LowRank],
    pair: Update,
) -> ModuleReport:
    norm = sum(outcome.norm**2 for outcome in outcomes) ** 0.5
    predicted = sum(outcome.predicted_error(pair.rank) ** 2 for outcome in outcomes) ** 0.5
    measured = _measured(outcomes, made, pair)
    predicted, measured = (error / norm if norm else 0.0 for error in (predicted, measured))
    return ModuleReport(
        module=plan.module,
        weights=tuple(float(weight) for weight in weights),
        coefficients=_coefficients(outcomes),
        ranks=tuple(0 if pair is None else pair.rank for pair in plan.pairs),
        rank=pair.rank,
        norm=norm,
        predicted_error=predicted,
        measured_error=measured,
        retained_energy=1 - predicted**2,
    )


def _coefficients(outcomes: Sequence[Outcome]) -> tuple[float, ...] | None:
    found = [outcome.coefficients for outcome in outcomes if outcome.coefficients is not None]
    return tuple(np.mean(found, axis=0).tolist()) if found else None


def _measured(outcomes: Sequence[Outcome], made: Sequence[LowRank], pair: Update) -> float:
    """Return the Frobenius norm of what the rounded factors are off by.

    Raises:
        UnsupportedError: if they overflowed.
    """
    each = zip(outcomes, made, acting(pair, made=True), strict=True)
    error = sum(o.error(scaled(m, pair.scale), kept) ** 2 for o, m, kept in each) ** 0.5
    if not math.isfinite(error):
        raise UnsupportedError(
            f"overflows {pair.b.dtype}; store it as f32 or bf16 (--outtype)", where=pair.module
        )
    return error
