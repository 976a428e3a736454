"""What a merge did, module by module; every field is a number, a text or a list of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapterkit.text import PLAIN, Pen, Shown, count, printable, short

# What float32 leaves of a relative error differs from processor to processor.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """One merged module.

    Attributes:
        module: Hugging Face path.
        weights: weight of each adapter, as it was used here.
        coefficients: what a method that makes Σ aᵢ ΔWᵢ made of them, of experts the mean; None for
            other methods.
        ranks: rank of each adapter's update, 0 where it has none.
        rank: rank of the result.
        norm: ‖ΔW‖, Frobenius, of what the method asks for, before any truncation.
        predicted_error: relative Frobenius error of the truncation, known from singular values.
        measured_error: relative Frobenius error of the stored factors, the rounding of their dtype
            included; computed from the factors, accurate to about 1e-8.
        retained_energy: 1 - predicted_error², the share of ‖ΔW‖² that the rank holds.
    """

    module: str
    weights: tuple[float, ...]
    coefficients: tuple[float, ...] | None
    ranks: tuple[int, ...]
    rank: int
    norm: float
    predicted_error: float
    measured_error: float
    retained_energy: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MergeReport(Shown):
    """A whole merge.

    Attributes:
        adapters: what was merged, by path or place.
        method: name of the method.
        space: where the method was applied, `delta`, `knots`, `core` or `core-balanced`; None for
            one that was not told.
        parameters: the method's own numbers, defaults included.
        seed: of the random methods; None for others.
        weights: weight of each adapter, before patterns for single modules.
        normalized: whether weights were divided by their sum.
        basis_dependent: whether another basis of the same updates would give another result.
        modules: every merged module.
        beside: tensors that are no factors, and how they were merged.
        max_predicted_error: largest of the modules.
        max_measured_error: largest of the modules.
        retained_energy: share of Σ‖ΔW‖² that the ranks hold.
        warnings: what the user should know.
    """

    adapters: tuple[str, ...]
    method: str
    space: str | None
    parameters: Mapping[str, float | None]
    seed: int | None
    weights: tuple[float, ...]
    normalized: bool
    basis_dependent: bool
    modules: tuple[ModuleReport, ...]
    beside: Mapping[str, str]
    max_predicted_error: float
    max_measured_error: float
    retained_energy: float
    warnings: tuple[str, ...] = ()
    _entries = "modules"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what was merged how, and what that cost."""
        del pen
        ranks = sorted({module.rank for module in self.modules})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "-"
        what = self.method + (f" in the {self.space} space" if self.space else "")
        return (
            f"{what} of {count(len(self.adapters), 'adapter')}: rank {shown}, "
            f"{self.retained_energy:.2%} of the energy, largest relative error {self._error()}"
        )

    def _error(self) -> str:
        """Return the error and its module; below what float32 leaves, neither says anything."""
        worst = max(self.modules, key=lambda m: m.measured_error, default=None)
        if worst is None or not worst.measured_error:
            return "0"
        if worst.measured_error < _ROUNDING:
            return f"below {_ROUNDING:g} (rounding)"
        return f"{short(worst.measured_error)} ({printable(worst.module)})"

    def remarks(self) -> list[tuple[str, str]]:
        """Return the warnings, and what became of the tensors that are no factors."""
        beside = [("note", f"{key}: {how}") for key, how in self.beside.items()]
        return [*Shown.remarks(self), *beside]
