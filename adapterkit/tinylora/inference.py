"""Which ties an ANRGUSC checkpoint was trained with, where its keys leave one answer.

Every tie group has exactly one key in the file, that of its first module in registration order. Any
setting that does not put the keys into groups so is wrong; several may be right, and then only the
run's own budget plan can decide between them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.errors import UsageError
from adapterkit.notes import first_and_more
from adapterkit.tables import whole
from adapterkit.tinylora.groups import PACK_MODES, pack_groups, partition
from adapterkit.tinylora.planner import CANDIDATES, SCRIPT_CANDIDATES, planned

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from adapterkit.tinylora.settings import TinySettings

_SHOWN = 6
_BUDGET = whole(1, 1 << 40)
_Tie = tuple[str, int]


def tie_groups(
    names: Sequence[str],
    keys: Collection[str],
    settings: TinySettings,
    metadata: Mapping[str, Any],
    *,
    ordered: bool,
    path: Path,
) -> tuple[TinySettings, dict[str, int], tuple[str, ...]]:
    """Return settings with the ties filled in, module -> group, and notes.

    Args:
        names: every injected module; in registration order if `ordered`.
        keys: modules that have a vector in the file.
        settings: what is known; a tie mode or factor among it is checked, never overruled.
        metadata: of the run: `budget_target` decides between several candidates.
        ordered: whether a group's key must be its first module.
        path: the checkpoint, for messages.

    Raises:
        UsageError: if no setting fits the keys, or several do.
    """
    fitting: dict[frozenset[frozenset[str]], list[_Tie]] = {}
    for tie in _ties(len(names), settings):
        groups = pack_groups(names, *tie)
        if _fits(groups, keys, ordered=ordered):
            fitting.setdefault(partition(groups), []).append(tie)
    if not fitting:
        given = _spelled((settings.tie_mode or "any", settings.tie_factor or 0))
        raise UsageError(
            f"its {len(keys)} vectors do not belong to groups of tie_mode {given} over "
            f"{len(names)} modules: another tie setting, target_modules or base",
            path=path,
        )
    chosen, notes = _chosen(list(fitting.values()), names, settings, metadata, path)
    known = replace(settings, tie_mode=chosen[0], tie_factor=chosen[1])
    return known, pack_groups(names, *chosen), notes


def _ties(modules: int, settings: TinySettings) -> Iterator[_Tie]:
    modes = (settings.tie_mode,) if settings.tie_mode else PACK_MODES
    for mode in modes:
        if mode in {"none", "all"}:
            yield mode, 1
        elif settings.tie_factor is not None:
            yield mode, settings.tie_factor
        else:
            yield from ((mode, factor) for factor in range(1, modules + 1))


def _fits(groups: Mapping[str, int], keys: Collection[str], *, ordered: bool) -> bool:
    if ordered:
        first: dict[int, str] = {}
        for name, group in groups.items():
            first.setdefault(group, name)
        return set(first.values()) == set(keys)
    hit = {groups[key] for key in keys}
    return len(hit) == len(keys) == len(set(groups.values()))


def _chosen(
    candidates: list[list[_Tie]],
    names: Sequence[str],
    settings: TinySettings,
    metadata: Mapping[str, Any],
    path: Path,
) -> tuple[_Tie, tuple[str, ...]]:
    every = [tie for ties in candidates for tie in ties]
    stated = settings.tie_mode is not None and len(every) == 1
    if len(candidates) == 1:
        tie = next((tie for tie in every if tie[0] == "tiled"), every[0])
        note = f"tie_mode {_spelled(tie)} told from the vectors' names, the only ties that fit them"
        return tie, () if stated else (note,)
    for tie in _planned(names, settings, metadata):
        if tie in every:
            target = metadata["budget_target"]
            return tie, (f"tie_mode {_spelled(tie)} told from the budget plan for {target}",)
    shown = first_and_more([_spelled(ties[0]) for ties in candidates], _SHOWN)
    raise UsageError(
        f"several ties fit the names of its vectors ({shown}); state tie_mode and tie_factor "
        "in tinylora.json beside it",
        path=path,
    )


def _planned(
    names: Sequence[str], settings: TinySettings, metadata: Mapping[str, Any]
) -> Iterator[_Tie]:
    """Yield what the pack's scripts would have set: they plan for a budget and tie in tiles."""
    budget = metadata.get("budget_target")
    if not isinstance(budget, int) or not _BUDGET.held_by(budget):
        return
    kinds = Counter(name.rpartition(".")[2] for name in names)
    for candidates in (SCRIPT_CANDIDATES, CANDIDATES):
        plan = planned("tiled", kinds, budget, candidates)
        if plan.projection_dim == settings.projection_dim and plan.tie_factor is not None:
            yield "tiled", plan.tie_factor


def _spelled(tie: _Tie) -> str:
    mode, factor = tie
    return f"{mode} {factor}" if mode in {"tiled", "structured"} and factor else mode
