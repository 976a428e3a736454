"""What an audit against a base found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightAudit:
    """One update W' = W + ΔW beside its weight; all numbers are None for ΔW = 0.

    Of DoRA (arXiv 2402.09353) this is the true update, D · (W + s · B · A) - W with
    D = diag(m / ‖rows of W + s · B · A‖).

    Attributes:
        modules: the adapted modules; several where the base holds them in one tensor.
        expert: number of the expert within the tensor; None without experts.
        tensor: the base's name of the place.
        shape: (out, in).
        dtype: stored type of the weight.
        kind: `low-rank`, or `dora`.
        base_spectral_norm: ‖W‖₂, by block Lanczos.
        base_residual: ‖Wᵀu - σv‖ / σ of it: some singular value of W is that near, relatively.
        base_frobenius_norm: ‖W‖_F.
        update_spectral_norm: ‖ΔW‖₂.
        update_frobenius_norm: ‖ΔW‖_F.
        udr: ‖ΔW‖₂ / ‖W‖₂, update to data ratio.
        udr_f: ‖ΔW‖_F / ‖W‖_F.
        sdi: log₁₀ udr.
        amplification: ‖ΔW‖_F / ‖UᵀWV‖_F, with U and V the r leading singular vectors of ΔW
            (arXiv 2106.09685, section 7): how far ΔW raises what W hardly does.
        retention: ‖Wᵀu‖ / σ of the ten leading left singular vectors u of W', σ its singular
            values: 1 for a direction that W has with that strength, near 0 for a new one.
        retention_residual: largest ‖W'ᵀu - σv‖ / σ₁ among them.
        intruder_dimensions: how many of them are not W's (arXiv 2410.21228): max |cos| < 0.5 with
            the left singular vectors of W. What is not decided counts by retention < 0.7.
        intruder_range: how many certainly are, and how many may be.
        intruder_cosines: that maximum for each of the ten; None where W was not decomposed.
    """

    modules: tuple[str, ...]
    expert: int | None
    tensor: str
    shape: tuple[int, int]
    dtype: str
    kind: str
    base_spectral_norm: float | None = None
    base_residual: float | None = None
    base_frobenius_norm: float | None = None
    update_spectral_norm: float | None = None
    update_frobenius_norm: float | None = None
    udr: float | None = None
    udr_f: float | None = None
    sdi: float | None = None
    amplification: float | None = None
    retention: tuple[float, ...] | None = None
    retention_residual: float | None = None
    intruder_dimensions: int | None = None
    intruder_range: tuple[int, int] | None = None
    intruder_cosines: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """The modules, or the one expert of them."""
        shown = self.modules[0] if len(self.modules) == 1 else self.tensor
        return shown if self.expert is None else f"{shown}[{self.expert}]"

    @property
    def least_retention(self) -> float | None:
        """The retention of the leading direction that W has least of."""
        return min(self.retention) if self.retention else None


@dataclass(frozen=True, slots=True)
class NotCompared:
    """A module whose weight is not there, or cannot be read.

    Attributes:
        module: Hugging Face path.
        reason: why.
    """

    module: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSummary:
    """An adapter against its base as a whole; over the updates that are not zero.

    Attributes:
        weights: updates that were compared.
        udr_mean: of the updates' udr, as all below; None without any.
        udr_median: see above.
        udr_p90: see above.
        udr_max: see above.
        sdi_median: see above.
        fraction_udr_gt_0_1: share of the updates with udr over 0.1.
        fraction_udr_gt_0_3: likewise over 0.3.
        udr_f_median: of udr_f.
        amplification_median: of the amplifications.
        retention_min: the least retention of any leading direction.
        intruder_dimensions: sum over the updates.
        intruder_range: likewise of their ranges.
        leading_directions: how many were looked at, ten for each update.
        residual_max: the worst residual of all.
    """

    weights: int
    udr_mean: float | None
    udr_median: float | None
    udr_p90: float | None
    udr_max: float | None
    sdi_median: float | None
    fraction_udr_gt_0_1: float | None
    fraction_udr_gt_0_3: float | None
    udr_f_median: float | None
    amplification_median: float | None
    retention_min: float | None
    intruder_dimensions: int
    intruder_range: tuple[int, int]
    leading_directions: int
    residual_max: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseAudit:
    """An adapter against its base.

    Attributes:
        path: the base.
        method: `estimate`, or `exact` for intruders by full decompositions.
        summary: all updates together.
        weights: one row for each weight, or expert of it.
        not_compared: modules without a weight to compare with.
    """

    path: str
    method: str
    summary: BaseSummary
    weights: tuple[WeightAudit, ...]
    not_compared: tuple[NotCompared, ...]
