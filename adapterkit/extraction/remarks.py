"""What a user should know of an extraction, one sentence each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.notes import first_and_more

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.extraction.factors import Outcome
    from adapterkit.extraction.ranks import Wish
    from adapterkit.extraction.report import ExtractedModule

# Share of ‖ΔW‖² that may be lost, beyond rounding, before the result is called poor.
POOR = 0.1
_SHOWN = 3
_NOISE = {
    True: "what was tuned from wider weights differs from it by its quantisation noise too",
    False: "the difference contains its quantisation noise",
}


def warnings(outcomes: Sequence[Outcome], asked: Wish) -> tuple[str, ...]:
    """Return what may make the adapter another one than was hoped for."""
    found: list[str] = []
    modules = [outcome.module for outcome in outcomes if outcome.module is not None]
    poor = [] if asked.rule.tolerance else [each for each in modules if _lost(each) > POOR]
    if poor:
        worst = max(poor, key=_lost)
        advice = "what is left has no low rank, as in a full fine-tune; --tol sets an error instead"
        if asked.rule.rank is not None:
            advice = "raise --rank, or leave it to auto"
        found.append(
            f"{len(poor)} of {len(modules)} modules lose more than {POOR:.0%} of ‖ΔW‖² beyond "
            f"rounding, {worst.tensor} {_lost(worst):.0%} at rank {worst.rank}; {advice}"
        )
    capped = [outcome for outcome in outcomes if outcome.capped]
    if capped and asked.most is not None:
        found.append(
            f"{len(capped)} of {len(modules)} modules would take more than {asked.most} ranks, "
            f"such as {capped[0].twin.name}; --max-rank raises the limit"
        )
    left = [o.left for o in outcomes if o.left is not None and not o.left.saved and not o.noise]
    if left:
        names = _listed([each.tensor for each in left])
        found.append(f"{_tensors(len(left))} left over: {names}")
    return tuple(found)


def notes(outcomes: Sequence[Outcome], base: BaseModel, tuned: BaseModel) -> tuple[str, ...]:
    """Return what was decided on the way."""
    found: list[str] = []
    saved = [o.twin.name for o in outcomes if o.left is not None and o.left.saved]
    if saved:
        found.append(f"{_tensors(len(saved))} saved whole: {_listed(saved)}")
    factored = [outcome for outcome in outcomes if outcome.module is not None]
    noise = [outcome.twin.name for outcome in outcomes if outcome.noise]
    if noise:
        found.append(
            f"{_tensors(len(noise))} left over that differ by no more than rounding: "
            + _listed(noise)
        )
    for model, what in ((base, "base"), (tuned, "tuned model")):
        kinds = {
            stored.value
            for outcome in factored
            for each in (outcome.twin.base if model is base else outcome.twin.tuned)
            for stored in each.dtypes
            if stored.quantised
        }
        if kinds:
            found.append(
                f"the {what} is quantised ({', '.join(sorted(kinds))}): {_NOISE[model is base]}"
            )
    tied = next((outcome for outcome in factored if len(outcome.pairs) > 1), None)
    if tied is not None:
        names = " and ".join(pair.module for pair in tied.pairs)
        found.append(
            f"{names} share one table: the update is there for both (merge with --tied untie)"
        )
    return tuple(found)


def _lost(module: ExtractedModule) -> float:
    """Return the share of ‖ΔW‖² that is lost and that rounding does not explain."""
    return module.relative_error**2 * (1 - (module.explained or 0.0))


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return first_and_more(names, _SHOWN)
