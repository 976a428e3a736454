"""What a plan of ranks says, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.text import PLAIN, Pen, Shown, count, short, span


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRank:
    """The rank planned for one module.

    Attributes:
        module: Hugging Face path.
        rank_before: inner dimension of the factors now.
        rank: planned inner dimension; all experts of a module share it.
        scale: effective multiplier, which stays.
        parameters: elements of the planned factors.
        relative_error: ‖ΔW - ΔW_k‖ / ‖ΔW‖ of the module; 0 for ΔW = 0.
        next_singular_value: σ_{k+1}, the spectral norm of what is left out; 0 if nothing is.
    """

    module: str
    rank_before: int
    rank: int
    scale: float
    parameters: int
    relative_error: float
    next_singular_value: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RankPlan(Shown):
    """A rank for every module.

    Attributes:
        policy: how the ranks were chosen, in words.
        parameters_before: elements of all factors now.
        parameters: elements of all factors as planned.
        relative_error: predicted ‖ΔW - ΔW_k‖ / ‖ΔW‖, Frobenius, of all modules together.
        max_module_error: the largest of a single module.
        modules: every module, in file order.
        peft: `r`, `lora_alpha`, `use_rslora`, `rank_pattern` and `alpha_pattern` with which PEFT
            creates these ranks and scales as now.
    """

    policy: str
    parameters_before: int
    parameters: int
    relative_error: float
    max_module_error: float
    modules: tuple[ModuleRank, ...]
    peft: Mapping[str, Any]
    _entries = "modules"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return the ranks, and what they cost."""
        del pen
        ranks = span("rank", self.ranks.values()) if self.modules else "no module"
        return (
            f"{ranks} ({self.policy}): {count(self.parameters, 'parameter')} of "
            f"{self.parameters_before:,}, relative error {short(self.relative_error)}"
        )

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> planned rank."""
        return {module.module: module.rank for module in self.modules}


@dataclass(frozen=True, slots=True)
class Alternative:
    """One point of the trade-off between size and error.

    Attributes:
        limit: the relative error, the rank or the share of the energy that every plan here keeps.
        parameters: elements of all factors.
        relative_error: predicted, of all modules together.
    """

    limit: float
    parameters: int
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Suggestion(Shown):
    """Rank advice for one adapter.

    Attributes:
        plan: the advised ranks.
        bounds: the smallest plan for each of some relative errors.
        energy_90: what every module at its energy_rank_90 costs and loses.
        uniform: what the same rank everywhere costs and loses, for some ranks.
    """

    plan: RankPlan
    bounds: tuple[Alternative, ...]
    energy_90: Alternative
    uniform: tuple[Alternative, ...]

    def text(self, pen: Pen = PLAIN) -> str:
        """Return the advised ranks, and what they cost."""
        return self.plan.text(pen)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each module."""
        return self.plan.rows()
