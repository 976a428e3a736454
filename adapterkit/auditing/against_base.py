"""An update against the weight that it changes: two weights in memory at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.auditing.base_report import BaseAudit, BaseSummary, NotCompared, WeightAudit
from adapterkit.auditing.base_sites import sites
from adapterkit.auditing.intruders import LEADING, intruders
from adapterkit.base.decoding import stored_type
from adapterkit.base.quantised import as_floats
from adapterkit.errors import (
    BaseRequiredError,
    FormatError,
    IncompatibleBaseError,
    UncheckableError,
)
from adapterkit.lowrank.decomposition import EXACT_ZERO, decompose
from adapterkit.lowrank.operators import Operator
from adapterkit.lowrank.products import LowRank, expert, updates
from adapterkit.lowrank.sketching import Triplets, leading, leading_together
from adapterkit.lowrank.spectrum import not_finite
from adapterkit.model import Kind
from adapterkit.tensor import LazyTensor
from adapterkit.work import in_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.auditing.base_sites import Site
    from adapterkit.base.model import BaseModel
    from adapterkit.lowrank.operators import Weight
    from adapterkit.model import AdapterTensorSet

# σ is right to the square of its residual; a direction to the residual over the gap.
_DIRECTIONS = 1e-3
# Weights that are held against their updates at a time: one of 14336 x 4096 takes 235 MB.
_AT_A_TIME = 2
# What float32 leaves of directions that W' does not have.
_NOTHING = 1e-6
# Elements up to which float64 products cost no memory to speak of.
_SMALL = 1 << 22
_LEVELS = (0.1, 0.3)


def against_base(adapter: AdapterTensorSet, base: BaseModel, *, exact: bool = False) -> BaseAudit:
    """Compare every update with its weight; two weights are in memory at a time.

    Args:
        adapter: whole and plain, its factors finite.
        base: with weights: safetensors, plain, fp8 or MXFP4, or GGUF of types that the gguf package
            decodes.
        exact: whether to decompose W and W' for the definition of intruder dimensions: hours for a
            large model.

    Raises:
        BaseRequiredError: if the base has no weights.
        IncompatibleBaseError: if a weight has another shape.
        UncheckableError: if no update could be compared.
        FormatError: if a weight or a factor is not finite.
    """
    if not base.has_tensors:
        raise BaseRequiredError("there are no weights here to compare with", path=base.path)
    base = as_floats(base)
    base = base.suited([pair.module for pair in adapter.pairs()])
    found, missing = _sites(adapter, base)
    rows: list[WeightAudit] = []
    compared = in_threads(lambda site: _compared(site, base, exact=exact), found, _AT_A_TIME)
    for site, of_site in zip(found, compared, strict=True):
        rows += of_site or []
        if of_site is None:
            reason = f"is stored as {site.stored.dtype.value}, which cannot be decoded here"
            missing += [NotCompared(module, reason) for module in site.modules]
    if not rows:
        reason = missing[0].reason if missing else "there are no updates"
        where = missing[0].module if missing else None
        message = f"{reason}; nothing could be compared with {base.path}"
        raise UncheckableError(message, where=where)
    return BaseAudit(
        path=str(base.path),
        method="exact" if exact else "estimate",
        summary=_summary(rows),
        weights=tuple(rows),
        not_compared=tuple(missing),
    )


def _sites(adapter: AdapterTensorSet, base: BaseModel) -> tuple[list[Site], list[NotCompared]]:
    """Return the sites of an adapter's modules; a diffusion model may have other names for them."""
    if not base.layout:
        return sites(adapter, base)
    from adapterkit.formats.diffusion.on_base import with_origins

    named, origins = with_origins(adapter, base)
    found, missing = sites(named, base)
    return (
        [replace(s, modules=tuple(o for m in s.modules for o in origins[m])) for s in found],
        [replace(each, module=o) for each in missing for o in origins.get(each.module, ())],
    )


def _compared(site: Site, base: BaseModel, *, exact: bool) -> list[WeightAudit] | None:
    """Return the rows of a weight; None where it cannot be decoded."""
    try:
        return list(_site(site, base, exact=exact))
    except NotImplementedError:
        return None


def _site(site: Site, base: BaseModel, *, exact: bool) -> Iterator[WeightAudit]:
    size = site.pair.matrix_shape
    _check_shape(site, base, size)
    for place, each in enumerate(updates(site.pair)):
        number = expert(site.pair, place)
        shown = site.expert if number is None else number
        row = WeightAudit(
            modules=site.modules,
            expert=shown,
            tensor=site.pair.module,
            shape=size,
            dtype=stored_type(site.stored).value,
            kind="low-rank" if site.magnitude is None else "dora",
        )
        if not (np.isfinite(each.b).all() and np.isfinite(each.a).all()):
            raise not_finite(site.pair)
        # A fused stack has zeros for the experts that are not adapted: their weights stay on disk.
        if site.magnitude is None and not (each.b.any() and each.a.any()):
            yield row
            continue
        weight = _weight(site, number, size)
        plain = Operator(weight)
        norm = plain.plane.norm()
        if not math.isfinite(norm):
            message = "the base's weight holds NaN or infinity"
            raise FormatError(message, path=base.path, where=site.pair.module)
        changed = Operator(weight, each.b, each.a)
        if site.magnitude is not None:
            lengths = changed.row_norms()
            rows = np.divide(site.magnitude, lengths, out=np.ones_like(lengths), where=lengths > 0)
            changed = replace(changed, rows=rows)
        yield _measured(row, plain, changed, norm, exact=exact)


def _check_shape(site: Site, base: BaseModel, size: tuple[int, int]) -> None:
    stored, stacked = site.stored.shape, site.pair.kind is Kind.EXPERTS
    lead = 1 if stacked else 0
    shown = (stored[lead], math.prod(stored[lead + 1 :])) if len(stored) > lead + 1 else stored
    wanted = size[::-1] if site.turned else size
    same_count = not stacked or stored[0] == site.pair.experts
    if shown != wanted or not same_count:
        raise IncompatibleBaseError(
            f"the base has {list(stored)} here, the adapter {list(site.pair.shape)}; is it the "
            "right base?",
            path=base.path,
            where=site.modules[0],
        )


def _weight(site: Site, number: int | None, size: tuple[int, int]) -> Weight:
    """Return W (out, in): one expert's rows only, float64 where that is small."""
    stored = site.stored
    values = (stored if number is None else _slice(stored, number)).numpy()
    kind = np.float64 if values.size <= _SMALL else np.float32
    weight = values.astype(kind).reshape(size[::-1] if site.turned else size)
    return weight.T if site.turned else weight


def _slice(stored: LazyTensor, index: int) -> LazyTensor:
    shape = stored.shape[1:]
    rows = stored.size // stored.shape[0] // shape[-1]
    found = stored.rows(index * rows, (index + 1) * rows)
    return LazyTensor(found.dtype, shape, found.read)


def _measured(
    row: WeightAudit, plain: Operator, changed: Operator, norm: float, *, exact: bool
) -> WeightAudit:
    update, size = _update(changed)
    spectral = float(update.values.max(initial=0.0))
    if not spectral:
        return row
    # One more than is looked at: how exact a direction is depends on the gap to the next.
    top, after = leading_together([plain, changed], LEADING + 1, tolerance=_DIRECTIONS)
    looked = int((after.values[:LEADING] > _NOTHING * after.values[0]).sum())
    held = np.linalg.norm(plain.transposed_times(after.left[:, :looked]), axis=0)
    retention = held / after.values[:looked]
    found = intruders(plain, changed, top, after, retention, exact=exact)
    base_top = float(top.values[0])
    seen = float(np.linalg.norm(update.left.T @ plain.times(update.right)))
    udr = spectral / base_top if base_top else None
    return replace(
        row,
        base_spectral_norm=base_top,
        base_residual=float(top.residuals[0]),
        base_frobenius_norm=norm,
        update_spectral_norm=spectral,
        update_frobenius_norm=size,
        udr=udr,
        udr_f=size / norm if norm else None,
        sdi=math.log10(udr) if udr else None,
        amplification=size / seen if seen else None,
        retention=tuple(retention.tolist()),
        retention_residual=float(after.residuals[:looked].max()),
        intruder_dimensions=found.count,
        intruder_range=(found.least, found.most),
        intruder_cosines=None if found.cosines is None else tuple(found.cosines.tolist()),
    )


def _update(changed: Operator) -> tuple[Triplets, float]:
    """Return the leading r triplets of ΔW, and ‖ΔW‖_F: from the factors, unless it is a DoRA."""
    assert changed.left is not None  # noqa: S101  (the update's operator)
    assert changed.right is not None  # noqa: S101  (as is its left)
    if changed.rows is not None:
        rank = min(changed.left.shape[1], *changed.shape)
        update = replace(changed, minus=True)
        return leading(update, rank, tolerance=_DIRECTIONS), update.plane.norm()
    found = decompose(LowRank(changed.left, changed.right), EXACT_ZERO)
    left, right = found.vectors
    return Triplets(found.values, left, right.T, np.zeros_like(found.values)), found.norm


def _summary(rows: list[WeightAudit]) -> BaseSummary:
    measured = [row for row in rows if row.udr is not None]
    ratios = np.array([row.udr for row in measured], dtype=np.float64)
    directions = [value for row in rows for value in row.retention or ()]
    residuals = [
        value
        for row in measured
        for value in (row.base_residual, row.retention_residual)
        if value is not None
    ]
    ratio: dict[str, Any] = {
        f"udr_{name}": float(function(ratios)) if len(ratios) else None
        for name, function in (("mean", np.mean), ("median", np.median), ("max", np.max))
    }
    above = [float(np.mean(ratios > level)) if len(ratios) else None for level in _LEVELS]
    return BaseSummary(
        weights=len(rows),
        udr_p90=float(np.quantile(ratios, 0.9)) if len(ratios) else None,
        sdi_median=_median(row.sdi for row in measured),
        fraction_udr_gt_0_1=above[0],
        fraction_udr_gt_0_3=above[1],
        udr_f_median=_median(row.udr_f for row in measured),
        amplification_median=_median(row.amplification for row in measured),
        retention_min=min(directions, default=None),
        intruder_dimensions=sum(row.intruder_dimensions or 0 for row in rows),
        intruder_range=(
            sum(row.intruder_range[0] for row in rows if row.intruder_range),
            sum(row.intruder_range[1] for row in rows if row.intruder_range),
        ),
        leading_directions=len(directions),
        residual_max=max(residuals, default=None),
        **ratio,
    )


def _median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
