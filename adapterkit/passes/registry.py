"""The passes, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import unknown
from adapterkit.passes.protocol import Context, Pass, Passed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adapterkit.model import AdapterTensorSet

NAMES = "names"
LOADED = "loaded-names"
# Passes that change names alone.
NAMING = frozenset({NAMES, LOADED})

PASSES = (
    Pass(
        name="declaration",
        promise="it is what its config says; tensors that the config denies leave if they are "
        "listed and allowed, and are refused otherwise",
        function="adapterkit.passes.declaration:settled",
        concerns=lambda adapter, _: adapter.undeclared,
    ),
    Pass(
        name="pooling",
        promise="the update is the one that PEFT applies on this base, its inputs pooled or not",
        function="adapterkit.passes.pooling:decided",
        concerns=lambda adapter, _: adapter.pooled_inputs,
    ),
    Pass(
        name="initialisation",
        promise="on the original base the adapter is the model that it was on the changed one",
        function="adapterkit.passes.initialisation:undone",
        concerns=lambda adapter, _: adapter.initialisation,
    ),
    Pass(
        name="dora",
        promise="every DoRA is the nearest LoRA of a rank, its error listed as a loss; all else "
        "stays",
        function="adapterkit.passes.magnitudes:truncated",
    ),
    Pass(
        name="copies",
        promise="a frozen copy of a table is the base's own, or a loss for a target without it",
        function="adapterkit.passes.copies:compared",
        concerns=lambda _, context: context.base is not None,
    ),
    Pass(
        name="vocabulary",
        promise="every row that the base has keeps its update, and no other row with one is lost "
        "unless it is listed and allowed",
        function="adapterkit.passes.vocabulary:matched",
        concerns=lambda _, context: context.base is not None,
    ),
    Pass(
        name="uniform",
        promise="every update stays the same, and all modules have one rank and one scale",
        function="adapterkit.passes.uniform:uniform",
    ),
    Pass(
        name="stacked",
        promise="every update stays the same, and modules that an engine stacks with others have "
        "one, of zero at least",
        function="adapterkit.passes.stacking:stacked",
    ),
    Pass(
        name=NAMES,
        promise="every update stays the same, under the path of its module in the base's class",
        function="adapterkit.passes.naming:named",
    ),
    Pass(
        name=LOADED,
        promise="every update stays the same, under the name by which PEFT leads it to its module",
        function="adapterkit.passes.naming:named_to_load",
    ),
    Pass(
        name="drop",
        promise="the tensors and files that the losses name leave, and no other",
        function="adapterkit.passes.dropping:drop",
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
