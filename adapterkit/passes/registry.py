"""The passes, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import unknown
from adapterkit.passes.copies import compared
from adapterkit.passes.declaration import settled
from adapterkit.passes.dropping import drop
from adapterkit.passes.initialisation import undone
from adapterkit.passes.magnitudes import truncated
from adapterkit.passes.naming import LOADED, NAMES, named, named_to_load
from adapterkit.passes.pooling import decided
from adapterkit.passes.protocol import Context, Pass, Passed
from adapterkit.passes.stacking import stacked
from adapterkit.passes.uniform import uniform
from adapterkit.passes.vocabulary import matched

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adapterkit.model import AdapterTensorSet

PASSES = (
    Pass(
        name="declaration",
        promise="it is what its config says; tensors that the config denies leave if they are "
        "listed and allowed, and are refused otherwise",
        change=settled,
    ),
    Pass(
        name="pooling",
        promise="the update is the one that PEFT applies on this base, its inputs pooled or not",
        change=decided,
    ),
    Pass(
        name="initialisation",
        promise="on the original base the adapter is the model that it was on the changed one",
        change=undone,
    ),
    Pass(
        name="dora",
        promise="every DoRA is the nearest LoRA of a rank, its error listed as a loss; all else "
        "stays",
        change=truncated,
    ),
    Pass(
        name="copies",
        promise="a frozen copy of a table is the base's own, or a loss for a target without it",
        change=compared,
    ),
    Pass(
        name="vocabulary",
        promise="every row that the base has keeps its update, and no other row with one is lost "
        "unless it is listed and allowed",
        change=matched,
    ),
    Pass(
        name="uniform",
        promise="every update stays the same, and all modules have one rank and one scale",
        change=uniform,
    ),
    Pass(
        name="stacked",
        promise="every update stays the same, and modules that an engine stacks with others have "
        "one, of zero at least",
        change=stacked,
    ),
    Pass(
        name=NAMES,
        promise="every update stays the same, under the path of its module in the base's class",
        change=named,
    ),
    Pass(
        name=LOADED,
        promise="every update stays the same, under the name by which PEFT leads it to its module",
        change=named_to_load,
    ),
    Pass(
        name="drop",
        promise="the tensors and files that the losses name leave, and no other",
        change=drop,
    ),
)


def by_name(name: str) -> Pass:
    """Return a pass.

    Raises:
        UsageError: if there is none of that name; the message lists all.
    """
    if found := next((known for known in PASSES if known.name == name), None):
        return found
    raise unknown("change", name, (known.name for known in PASSES))


def apply(names: Iterable[str], adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the adapter after several passes, in this order, with all that they said."""
    done = Passed(adapter)
    for name in names:
        next_one = by_name(name).change(done.adapter, context)
        done = Passed(
            next_one.adapter,
            (*done.notes, *next_one.notes),
            (*done.losses, *next_one.losses),
        )
    return done
