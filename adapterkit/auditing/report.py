"""What an audit found, as plain data."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, fields
from typing import Any

from adapterkit.attempts import Attempt
from adapterkit.auditing.base_report import BaseAudit
from adapterkit.auditing.interference import Interference
from adapterkit.auditing.reference_report import ReferenceAudit
from adapterkit.lowrank.rank_plan import RankPlan, Suggestion
from adapterkit.text import PLAIN, Pen, Shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleAudit:
    """One matrix: a module, or one expert of a module.

    The shape metrics are those of `adapterkit.auditing.metrics.Shape`; all are None if the update
    is zero. Norms and singular values include the scale.

    Attributes:
        module: Hugging Face path.
        expert: number of the expert within its tensor; None without experts.
        family: the path with every number as `*`.
        stack: path of the list of layers; empty outside of layers.
        layer: number within the stack; None outside of layers.
        shape: (out, in) of B · A, a convolution's kernel counted as inputs; of an embedding
            (width, vocabulary).
        rank: inner dimension of the factors.
        scale: effective multiplier.
        parameters: elements of both factors.
        dtype: stored type of the factors, `BF16` or `F16/F32` for A and B.
        state: `trained`, or `untrained` for ΔW = 0.
        low_rank_only: whether the update has another part that depends on the base (DoRA).
        singular_values: of ΔW, descending.
        spectral_norm: σ₁.
        frobenius_norm: √Σσ².
        nuclear_norm: Σσ.
        rms: root mean square of the entries of ΔW.
        null_ratio: stable rank over that of random factors of the same shapes; 1 is chance.
        row_hoyer: concentration of the row norms of B · A, 0 (even) to 1 (one row).
        row_top8: share of the energy in the eight largest rows.
        column_hoyer: likewise of the columns.
        column_top8: likewise of the columns.
        balance: ‖A‖ / ‖B‖; None if B is zero. The only number that depends on the basis.
        rms_z: robust z of log rms within the family, trend over depth removed; None for a family
            of fewer than 16, or without spread.
        stable_rank_z: likewise of the stable rank.
        row_top8_z: likewise of row_top8.
    """

    module: str
    expert: int | None
    family: str
    stack: str
    layer: int | None
    shape: tuple[int, int]
    rank: int
    scale: float
    parameters: int
    dtype: str
    state: str
    low_rank_only: bool
    singular_values: tuple[float, ...]
    spectral_norm: float
    frobenius_norm: float
    nuclear_norm: float
    rms: float
    stable_rank: float | None
    utilization: float | None
    effective_rank: float | None
    effective_rank_energy: float | None
    participation_ratio: float | None
    energy_rank_90: int | None
    energy_rank_95: int | None
    energy_rank_99: int | None
    energy_error_90: float | None
    energy_error_95: float | None
    energy_error_99: float | None
    numerical_rank: int | None
    numerical_rank_stored: int | None
    condition: float | None
    entropy: float | None
    top1_energy: float | None
    null_ratio: float | None
    row_hoyer: float | None
    row_top8: float | None
    column_hoyer: float | None
    column_top8: float | None
    balance: float | None
    rms_z: float | None = None
    stable_rank_z: float | None = None
    row_top8_z: float | None = None

    @property
    def name(self) -> str:
        """The module, with the number of the expert in brackets."""
        return self.module if self.expert is None else f"{self.module}[{self.expert}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyAudit:
    """The modules of one kind in all layers.

    Attributes:
        family: the path with every number as `*`.
        updates: number of matrices.
        untrained: how many of them are zero.
        ranks: smallest and largest rank.
        scales: smallest and largest effective multiplier.
        parameters: elements of all factors.
        energy_share: part of the adapter's Σσ².
        stable_rank_median: None if all are untrained, as all below.
        effective_rank_median: as in `ModuleAudit`.
        energy_rank_90_median: as in `ModuleAudit`.
        energy_rank_99_median: as in `ModuleAudit`.
        rms_median: as in `ModuleAudit`.
        spectral_norm_max: as in `ModuleAudit`.
    """

    family: str
    updates: int
    untrained: int
    ranks: tuple[int, int]
    scales: tuple[float, float]
    parameters: int
    energy_share: float | None
    stable_rank_median: float | None
    effective_rank_median: float | None
    energy_rank_90_median: float | None
    energy_rank_99_median: float | None
    rms_median: float | None
    spectral_norm_max: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShare:
    """How much of the update one layer holds.

    Attributes:
        stack: path of the list of layers; empty for what is outside of layers.
        layer: number within the stack; None for what is outside.
        updates: number of matrices.
        energy: Σσ².
        energy_share: part of the adapter's Σσ²; None if that is zero.
        mean_square_share: part of the sum over layers of the mean squared entry, so that wide
            modules count no more than narrow ones; None if that is zero.
    """

    stack: str
    layer: int | None
    updates: int
    energy: float
    energy_share: float | None
    mean_square_share: float | None

    @property
    def name(self) -> str:
        """`model.layers.3`, or `(no layer)`."""
        return "(no layer)" if self.layer is None else f"{self.stack}.{self.layer}".lstrip(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSummary:
    """The adapter as a whole; means and medians are over the matrices that are not zero.

    Attributes:
        modules: adapted modules.
        updates: matrices, stacked experts one by one.
        untrained: how many of them are zero.
        parameters: elements of all factors.
        ranks: smallest and largest rank.
        scales: smallest and largest effective multiplier.
        stable_rank_mean: as in `Shape`, like all below.
        stable_rank_median: see above.
        stable_rank_weighted_mean: weighted by the number of parameters.
        effective_rank_mean: see above.
        effective_rank_energy_mean: see above.
        participation_ratio_mean: see above.
        utilization_mean: see above.
        energy_rank_90_p50: quantiles interpolate linearly between whole numbers.
        energy_rank_90_p90: see above.
        energy_rank_95_p50: see above.
        energy_rank_95_p90: see above.
        energy_rank_99_p50: see above.
        energy_rank_99_p90: see above.
        entropy_mean: see above.
        top1_energy_mean: see above.
        spectral_norm_mean: see above.
        spectral_norm_max: see above.
        frobenius_norm_mean: see above.
        frobenius_norm: of all updates together.
        energy: Σσ² of all updates.
        rms_median: see above.
        concentration_index: Σ share² of the layers' energy shares (Herfindahl); 1 / layers if even.
        concentration_index_by_size: likewise of the size-normalised shares.
    """

    modules: int
    updates: int
    untrained: int
    parameters: int
    ranks: tuple[int, int]
    scales: tuple[float, float]
    stable_rank_mean: float | None
    stable_rank_median: float | None
    stable_rank_weighted_mean: float | None
    effective_rank_mean: float | None
    effective_rank_energy_mean: float | None
    participation_ratio_mean: float | None
    utilization_mean: float | None
    energy_rank_90_p50: float | None
    energy_rank_90_p90: float | None
    energy_rank_95_p50: float | None
    energy_rank_95_p90: float | None
    energy_rank_99_p50: float | None
    energy_rank_99_p90: float | None
    entropy_mean: float | None
    top1_energy_mean: float | None
    spectral_norm_mean: float | None
    spectral_norm_max: float | None
    frobenius_norm_mean: float | None
    frobenius_norm: float
    energy: float
    rms_median: float | None
    concentration_index: float | None
    concentration_index_by_size: float | None


@dataclass(frozen=True, slots=True)
class Unaudited:
    """A tensor that no number of the audit covers.

    Attributes:
        tensor: module and role.
        reason: why.
    """

    tensor: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AdapterAudit(Shown):
    """One adapter, measured.

    Attributes:
        source: file or directory; None for an adapter made in memory.
        format: name of its format; None likewise.
        base_model: hub id or path of the model it was trained on, as recorded.
        dtypes: stored types of the factors.
        bytes: size of all tensors.
        tensors: number of stored tensors.
        unaudited: those that no number covers.
        notes: what the reader normalised, one sentence each.
        health: what a user should know before using the numbers, one sentence each.
        summary: the adapter as a whole.
        families: one row for each kind of module, in file order.
        layers: shares of the layers, in order.
        modules: every matrix, in file order.
        base: the updates against the base's weights; None if none were given.
        reference: the adapter against a bank of others; None if none was given.
    """

    source: str | None
    format: str | None
    base_model: str | None
    dtypes: tuple[str, ...]
    bytes: int
    tensors: int
    unaudited: tuple[Unaudited, ...]
    notes: tuple[str, ...]
    health: tuple[str, ...]
    summary: AuditSummary
    families: tuple[FamilyAudit, ...]
    layers: tuple[LayerShare, ...]
    modules: tuple[ModuleAudit, ...]
    base: BaseAudit | None = None
    reference: ReferenceAudit | None = None
    _entries = "modules"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return the view of the adapter."""
        return AuditReport(adapters=(self,)).text(pen)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AuditReport(Shown):
    """The answer of `audit`.

    Attributes:
        adapters: every adapter that was given, in order.
        suggestions: rank advice for each adapter, if it was asked for; else empty.
        interference: every adapter against every other; None for a single one.
        failed: those that could not be audited, with `keep_going`.
    """

    adapters: tuple[AdapterAudit, ...]
    suggestions: tuple[Suggestion, ...] = ()
    interference: Interference | None = None
    failed: tuple[Attempt[AdapterAudit], ...] = ()
    _view = "adapterkit.auditing.view:view"

    def __repr__(self) -> str:
        if len(self.adapters) == 1:
            return Shown.__repr__(self)
        names = textwrap.shorten(", ".join(a.source or "?" for a in self.adapters), 120)
        return f"<AuditReport: {len(self.adapters)} adapters: {names}>"

    @property
    def summary(self) -> AuditSummary:
        """The first adapter as a whole."""
        return self.adapters[0].summary

    @property
    def modules(self) -> tuple[ModuleAudit, ...]:
        """Every matrix of the first adapter."""
        return self.adapters[0].modules

    @property
    def plans(self) -> tuple[RankPlan, ...]:
        """The suggested rank plan of each adapter."""
        return tuple(each.plan for each in self.suggestions)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each matrix of each adapter."""
        return [
            {"adapter": audited.source, **{f.name: getattr(module, f.name) for f in fields(module)}}
            for audited in self.adapters
            for module in audited.modules
        ]
