"""What no factors hold, as saved modules that PEFT loads: whole, with all that PEFT wraps for them.

PEFT wraps every module whose path ends with a saved name, in letters and not in components
(`norm` is also `input_layernorm`), and asks the file for all that is stored of each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.base.places import Places
from adapterkit.keys import Role, TensorKey
from adapterkit.lora_config.selection import saved_for

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.extraction.factors import Outcome
    from adapterkit.tensor import LazyTensor

_BIAS = ".bias"


def savable(
    outcomes: Sequence[Outcome], base: BaseModel, adapted: Collection[str]
) -> list[Outcome]:
    """Return the outcomes with those saved whole that PEFT can save, and why it cannot the others.

    Args:
        outcomes: of all tensors.
        base: the model before.
        adapted: the modules that have factors.
    """
    live = [*_live(base)]
    return [_saving(outcome, live, adapted) for outcome in outcomes]


def saved_whole(outcomes: Iterable[Outcome], base: BaseModel) -> dict[TensorKey, LazyTensor]:
    """Return what is saved whole, and the base's own of all else that PEFT wraps with it."""
    saved = [outcome for outcome in outcomes if outcome.left is not None and outcome.left.saved]
    found = {
        parameter: outcome.twin.tensor
        for outcome in saved
        for parameter in _parameters(outcome, all_names=not base.tied)
    }
    live = _live(base)
    for name in list(map(saved_module, found)):
        for parameter in _wrapped(name, live) if name is not None else ():
            found.setdefault(parameter, live[parameter])
    return {TensorKey(parameter, Role.FULL): tensor for parameter, tensor in found.items()}


def saved_module(parameter: str) -> str | None:
    """Return the module that is saved for a parameter; None for a bias, which needs none."""
    return None if parameter.endswith(_BIAS) else parameter.rpartition(".")[0]


def _saving(outcome: Outcome, live: Collection[str], adapted: Collection[str]) -> Outcome:
    left, twin = outcome.left, outcome.twin
    if left is None or twin.respelled or not twin.tensor.dtype.floating or outcome.noise:
        return outcome
    for parameter in _parameters(outcome, all_names=True):
        if reason := _unsavable(parameter, live, adapted):
            return replace(outcome, left=replace(left, reason=f"{left.reason}; {reason}"))
    return replace(outcome, left=replace(left, saved=True))


def _unsavable(parameter: str, live: Collection[str], adapted: Collection[str]) -> str | None:
    """Return why PEFT cannot save a parameter; None if it can."""
    name = saved_module(parameter)
    if name is None:
        return None
    if not name:
        return "it is in no module that PEFT could save"
    for module in adapted:
        for taken in saved_for(module, name):
            held = "is adapted" if taken == module else f"holds {module}, which is adapted"
            return f"PEFT would save {taken} for the name {name}, and that {held}"
    for each in live:
        if len(taken := saved_for(each.rpartition(".")[0], name)) > 1:
            inside = f"{taken[0]} inside of {taken[1]}"
            return f"for the name {name} PEFT would save {inside}, which it cannot load"
    return None


def _wrapped(name: str, live: Mapping[str, LazyTensor]) -> list[str]:
    """Return the parameters of all modules whose paths end with a name."""
    return [each for each in live if saved_for(each.rpartition(".")[0], name)]


def _live(base: BaseModel) -> dict[str, LazyTensor]:
    """Return the base's tensors by their paths in its class."""
    places = Places(base)
    return {places.spelling.memory(name): tensor for name, tensor in base.tensors.items()}


def _parameters(outcome: Outcome, *, all_names: bool) -> list[str]:
    """Return a saved parameter's names as PEFT spells it; of a table that is shared, the first."""
    modules = outcome.twin.modules if all_names else outcome.twin.modules[:1]
    weight = outcome.twin.name.endswith(".weight")
    return [f"{module}.weight" if weight else module for module in modules]
