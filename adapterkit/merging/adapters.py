"""Adapters into one adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adapterkit.dtype import DType
from adapterkit.errors import UsageError
from adapterkit.loading import load
from adapterkit.lowrank.ranks import rank_rule
from adapterkit.merging import planning
from adapterkit.merging.beside import Beside, bias_keys, merge_beside
from adapterkit.merging.combination import Combination, check, numbers, seed_of, space_of
from adapterkit.merging.modules import MergedModule, Settings, merge_module
from adapterkit.merging.planning import ModulePlan, Source
from adapterkit.merging.registry import Kind, remark
from adapterkit.merging.registry import method as find_method
from adapterkit.merging.report import MergeReport, ModuleReport
from adapterkit.model import AdapterTensorSet
from adapterkit.model.joining import joint_base, joint_source
from adapterkit.model.tying import one_spelling
from adapterkit.saving import stored_type
from adapterkit.several import each_of
from adapterkit.text import PLAIN, Pen, Shown
from adapterkit.work import in_threads, watchable

_ENERGY = 0.9
# Shares of a mean below which little of it is left.
_LITTLE = 0.1
# Planes from here on are merged one after the other: each holds up to 64 MB.
_LARGE = 1 << 22


@dataclass(frozen=True, slots=True, repr=False)
class MergeResult(Shown):
    """What a merge gives.

    Attributes:
        adapter: the merged adapter, in memory, factors rounded to their stored dtype.
        report: what it cost, module by module.
    """

    adapter: AdapterTensorSet
    report: MergeReport

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what was merged how, and what that cost."""
        return self.report.text(pen)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each merged module."""
        return self.report.rows()


@watchable
def merge(
    sources: Sequence[AdapterTensorSet | Path | str],
    *,
    weights: Sequence[float] | None = None,
    method: str = "svd",
    rank: int | str | None = None,
    tol: float | None = None,
    energy: float | None = None,
    density: float | None = None,
    params: Mapping[str, float] | None = None,
    seed: int | None = None,
    space: str | None = None,
    normalize: bool = False,
    module_weights: Sequence[Mapping[str, float]] | None = None,
    missing: str = "zero",
    any_base: bool = False,
    dtype: DType | str | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Merge adapters of any format, ranks, scales and target sets into one, without a base.

    Every method works on the updates ΔW = scale · B · A and not on the factors, so the basis that
    an adapter happens to be stored in does not matter (`linear-peft` excepted). A module that an
    adapter does not have is a zero update there.

    Args:
        sources: at least one, in memory or of any format.
        weights: one for each adapter, used as they are; by default 1 each for methods that sum, and
            1 / T each for methods that average, where Σw is the strength of the result.
        method: name of a row in `adapterkit.merge_methods()`.
        rank: rank of every module; by default the rank of what the method asks for, so that nothing
            is lost (for elementwise rules in the delta space, which no small rank holds, Σ rᵢ
            unless `tol` or `energy` ask for more). `auto` goes with `tol` or `energy`.
        tol: largest relative Frobenius error of a module, from which the rank follows, up to the
            smaller side of the matrix.
        energy: smallest share of ‖ΔW‖² that is kept, likewise; the same as tol = √(1 - energy).
        density: share of the entries that a rule keeps.
        params: the method's other numbers, by the names in its row.
        seed: of the random rules; 0 by default. Masks depend on seed, module and adapter alone.
        space: where an elementwise rule is applied: `delta` (entries of ΔW), `knots`, `core` or
            `core-balanced`, whose results have a small rank. `core` is that of the factors as they
            are stored, and depends on their basis. Methods on singular vectors take it too.
        normalize: divide the weights of each module by their sum.
        module_weights: for each adapter, patterns of module paths with their own weights, read as
            PEFT reads `rank_pattern`.
        missing: `zero` or `error`, for modules that not all adapters have.
        any_base: merge adapters whose recorded bases have different names.
        dtype: stored type of all results; by default the widest of each module's sources.
        jobs: modules that are merged at a time; by default one for each processor, 4 at most.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        UsageError: if arguments contradict each other.
        FormatError: if an adapter is broken or not finite.
        UnsupportedError: if an adapter holds what cannot be merged without its base.
    """
    del progress  # told by `watchable`
    spec = find_method(method)
    kind = stored_type(dtype)
    loaded = [
        each if isinstance(each, AdapterTensorSet) else load(each).adapter
        for each in each_of(sources)
    ]
    adapters, tied = one_spelling(loaded)
    found = planning.sources(adapters, weights, module_weights, spec)
    if missing not in {"zero", "error"}:
        raise UsageError(f"missing is {missing!r}, neither zero nor error")
    rule = rank_rule(rank, tol, energy)
    how = Combination(
        spec=spec,
        parameters=numbers(spec, density, params),
        space=space_of(spec, space),
        seed=seed_of(spec, seed),
        rank=rule.rank,
        tolerance=None if tol is None and energy is None else rule.tolerance,
    )
    check(how)
    planning.check(found, any_base=any_base)
    planned = planning.plans(found, missing=missing)
    settings = Settings(how, rule, normalize, kind, _alpha(planned, how))
    labels = [source.label for source in found]
    merged = _merged(planned, partial(merge_module, settings=settings, labels=labels), jobs, how)
    scales = {module.pair.module: module.pair.scale for module in merged}
    keys = bias_keys(found, list(scales))
    beside = merge_beside(found, spec, scales, keys, kind)
    adapter = _assembled(found, merged, beside).replace(tied=tied)
    notes = [*filter(None, [remark(method)]), *planning.absences(planned, found)]
    return MergeResult(adapter, _report(found, how, merged, beside, notes, normalize=normalize))


def _alpha(planned: Sequence[ModulePlan], how: Combination) -> int:
    """Return the number that scale · rank is for every module, so that a file needs one alpha."""
    if how.rank is None:
        return max((plan.rank for plan in planned), default=1)
    largest = max((plan.largest_rank(dense=how.dense) for plan in planned), default=1)
    return min(how.rank, largest)


def _merged(
    planned: Sequence[ModulePlan], work: Any, jobs: int | None, how: Combination
) -> list[MergedModule]:
    large = any(np.prod(plan.present[0].matrix_shape) > _LARGE for plan in planned)
    return in_threads(work, planned, 1 if how.dense and large else jobs)


def _assembled(
    found: Sequence[Source], merged: Sequence[MergedModule], beside: Beside
) -> AdapterTensorSet:
    first = found[0].adapter
    layouts: dict[str, str] = {}
    for source in found:
        layouts |= source.adapter.engine_layout
    return AdapterTensorSet.of(
        (module.pair for module in merged),
        beside.tensors,
        base=joint_base([each.adapter for each in found]),
        layer_replication=first.layer_replication,
        invocation_tokens=first.invocation_tokens,
        token_indices=beside.token_indices,
        engine_layout=layouts,
        source=joint_source([each.adapter for each in found]),
    )


def _report(
    found: Sequence[Source],
    how: Combination,
    merged: Sequence[MergedModule],
    beside: Beside,
    notes: Sequence[str],
    *,
    normalize: bool,
) -> MergeReport:
    modules = tuple(module.report for module in merged)
    squared = [module.norm**2 for module in modules]
    kept = sum(m.retained_energy * s for m, s in zip(modules, squared, strict=True))
    energy = kept / sum(squared) if sum(squared) else 1.0
    return MergeReport(
        adapters=tuple(source.label for source in found),
        method=how.spec.name,
        space=how.space,
        parameters=how.parameters,
        seed=how.seed if how.spec.random else None,
        weights=tuple(source.weight for source in found),
        normalized=normalize,
        basis_dependent=how.basis_dependent,
        modules=modules,
        beside=beside.how,
        max_predicted_error=max((m.predicted_error for m in modules), default=0.0),
        max_measured_error=max((m.measured_error for m in modules), default=0.0),
        retained_energy=energy,
        warnings=(*notes, *_warnings(how, modules)),
    )


def _shrunk(how: Combination, modules: Sequence[ModuleReport]) -> list[str]:
    """Say where a mean of updates that have little in common leaves little of them."""
    sums = [
        (abs(sum(module.coefficients) / sum(module.weights)), module.module)
        for module in modules
        if how.spec.mean and not how.spec.directed and module.coefficients and sum(module.weights)
    ]
    little = [each for each in sums if each[0] < _LITTLE]
    if not little:
        return []
    share, module = min(little)
    said = (
        f"{how.spec.name} leaves less than {_LITTLE:.0%} of the mean in {len(little)} of "
        f"{len(modules)} modules, {share:.2%} in {module}: the updates there are unrelated or "
        "oppose each other; linear, ties or karcher do not shrink them"
    )
    return [said]


def _warnings(how: Combination, modules: Sequence[ModuleReport]) -> list[str]:
    found: list[str] = []
    if how.basis_dependent:
        other = "core-balanced" if how.spec.kind is Kind.ELEMENTWISE else "linear"
        found.append(f"{how.spec.name} depends on the basis of the factors; {other} does not")
    shrunk = _shrunk(how, modules)
    found += shrunk
    if zero := sum(not module.norm for module in modules if not shrunk):
        found.append(
            f"{zero} of {len(modules)} modules are zero: their weighted updates cancel, or none "
            "was trained"
        )
    weak = [module for module in modules if module.retained_energy < _ENERGY]
    if weak:
        worst = min(weak, key=lambda module: module.retained_energy)
        advice = "raise the rank"
        if how.spec.kind is Kind.ELEMENTWISE and how.space == "delta":
            advice = "use --space knots or core-balanced, raise the rank, or merge --into a base"
        found.append(
            f"{len(weak)} of {len(modules)} modules keep less than {_ENERGY:.0%} of their energy, "
            f"{worst.module} {worst.retained_energy:.0%} at rank {worst.rank}; {advice}"
        )
    asked = how.dense and how.tolerance is not None
    if grown := [module for module in modules if asked and module.rank > sum(module.ranks)]:
        most = max(grown, key=lambda module: module.rank)
        found.append(
            f"{len(grown)} of {len(modules)} modules need more than the sum of the ranks to stay "
            f"within the error that was asked for, {most.module} rank {most.rank}; "
            f"{how.spec.name} has no small rank"
        )
    return found
