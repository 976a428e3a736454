"""TinyLoRA: updates inside the leading singular subspaces of the base, steered by a few numbers.

ΔW = scale · left · (Σᵢ vᵢ Pᵢ) · right, with frozen left (out, r) and right (r, in), fixed
projections P (u, r, r) and coefficients v (u,) that a group of modules shares (arXiv 2602.04118).
The forms differ in what left and right are, in the scale, in how P is drawn and in what they store.
"""

from __future__ import annotations

from adapterkit.tinylora.adapter import TinyAdapter, TinyModule
from adapterkit.tinylora.planner import BudgetPlan, PlanReport, plan
from adapterkit.tinylora.projecting import ProjectionReport, beyond_reach, project
from adapterkit.tinylora.settings import TARGETS, TinySettings

__all__ = [
    "TARGETS",
    "BudgetPlan",
    "PlanReport",
    "ProjectionReport",
    "TinyAdapter",
    "TinyModule",
    "TinySettings",
    "beyond_reach",
    "plan",
    "project",
]
