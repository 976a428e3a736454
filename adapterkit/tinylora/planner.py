"""Which projection size and which ties reach a budget of trained numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.errors import IncompatibleBaseError, UsageError
from adapterkit.text import PLAIN, Pen, Shown, columns, count, printable
from adapterkit.tinylora.groups import peft_group_count
from adapterkit.tinylora.settings import TARGETS
from adapterkit.tinylora.targets import target_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from adapterkit.base import BaseModel

# What the pack's planner tries unless told otherwise; its scripts leave out 8.
CANDIDATES = (1, 2, 4, 8)
SCRIPT_CANDIDATES = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """The setting of one tie mode that comes nearest to the budget.

    Attributes:
        mode: `tiled`, `structured`, `all`, `none` of the pack, or `peft`.
        projection_dim: u, coefficients per group.
        tie_factor: modules that share a vector; None for PEFT.
        weight_tying: PEFT's setting; None for the others.
        groups: vectors that are trained.
        parameters: numbers that are trained, u times groups.
    """

    mode: str
    projection_dim: int
    tie_factor: int | None
    weight_tying: float | None
    groups: int
    parameters: int

    @property
    def tied(self) -> str:
        """The setting that ties, and its value."""
        if self.weight_tying is not None:
            return f"weight_tying {self.weight_tying:.6g}"
        return f"tie_factor {self.tie_factor}" if self.mode in {"tiled", "structured"} else "-"


@dataclass(frozen=True, kw_only=True, repr=False)
class PlanReport(Shown):
    """What reaches a budget on a base.

    Attributes:
        base: path of the base model.
        budget: numbers asked for.
        target_modules: last name components that are adapted.
        modules: how many modules these are.
        plans: one for each tie mode, in the order of `MODES`.
    """

    base: str
    budget: int
    target_modules: tuple[str, ...]
    modules: int
    plans: tuple[BudgetPlan, ...]
    _entries = "plans"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return a row for each tie mode."""
        named = f"{count(self.modules, 'module')} ({', '.join(self.target_modules)})"
        header = ("ties", "projection size", "tied by", "vectors", "numbers")
        cells = [
            (
                each.mode,
                str(each.projection_dim),
                each.tied,
                f"{each.groups:,}",
                f"{each.parameters:,}",
            )
            for each in self.plans
        ]
        table = columns(cells, header=header, pen=pen)
        return f"{printable(named)}, {self.budget:,} numbers wanted\n\n{table}"


def plan(
    base: BaseModel,
    *,
    budget: int,
    targets: Sequence[str] = TARGETS,
    candidates: Sequence[int] = CANDIDATES,
) -> PlanReport:
    """Find, for every tie mode, the projection size and ties nearest to a budget.

    Args:
        base: the model; only its headers are read.
        budget: trained numbers to aim at.
        targets: last name components of the linear layers to adapt.
        candidates: projection sizes to try, in this order.

    Raises:
        UsageError: if the budget or a candidate is less than 1.
        IncompatibleBaseError: if the base has none of the targets.
    """
    if budget < 1 or not candidates or min(candidates) < 1:
        raise UsageError("the budget and every projection size must be at least 1")
    names = target_modules(base, targets)
    if not names:
        wanted = " or ".join(map(printable, targets))
        raise IncompatibleBaseError(f"has no linear layer {wanted}", path=base.path)
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return PlanReport(
        base=str(base.path),
        budget=budget,
        target_modules=tuple(sorted(kinds)),
        modules=len(names),
        plans=tuple(planned(mode, kinds, budget, candidates) for mode in MODES),
    )


def planned(
    mode: str, kinds: Counter[str], budget: int, candidates: Iterable[int] = CANDIDATES
) -> BudgetPlan:
    """Return one mode's plan: nearest to the budget, then fewest numbers, then first tried.

    Args:
        mode: one of `MODES`.
        kinds: last name component -> modules.
        budget: numbers to aim at.
        candidates: projection sizes, tried in order with every tie factor.
    """
    best: tuple[tuple[int, int], int, int] | None = None
    count = MODES[mode]
    for size in candidates:
        for factor in _factors(mode, kinds.total()):
            parameters = size * count(kinds, factor)
            rank = (abs(parameters - budget), parameters)
            if best is None or rank < best[0]:
                best = (rank, size, factor)
    if best is None:
        raise UsageError("no projection sizes to choose from")
    (_, parameters), size, factor = best
    tying = 1 - count(kinds, factor) / kinds.total() if mode == "peft" else None
    return BudgetPlan(
        mode=mode,
        projection_dim=size,
        tie_factor=None if mode == "peft" else factor,
        weight_tying=tying,
        groups=parameters // size,
        parameters=parameters,
    )


def _factors(mode: str, modules: int) -> range:
    """Return what to try: tie factors, or for PEFT the number of groups, fewest sharing first."""
    if mode in {"none", "all"}:
        return range(1, 2)
    return range(modules, 0, -1) if mode == "peft" else range(1, modules + 1)


def _tiled(kinds: Counter[str], factor: int) -> int:
    return -(-kinds.total() // factor)


def _structured(kinds: Counter[str], factor: int) -> int:
    return sum(-(-count // factor) for count in kinds.values())


def _peft(kinds: Counter[str], groups: int) -> int:
    # A ratio is what the config holds; the groups that PEFT makes of it are what counts.
    return peft_group_count(kinds.total(), 1 - groups / kinds.total())


# mode -> number of groups, given the modules of each kind and the factor.
MODES: dict[str, Callable[[Counter[str], int], int]] = {
    "tiled": _tiled,
    "structured": _structured,
    "all": lambda _kinds, _factor: 1,
    "none": lambda kinds, _factor: kinds.total(),
    "peft": _peft,
}
