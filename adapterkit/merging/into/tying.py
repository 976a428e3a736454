"""An embedding and an output that share one table, and are changed apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.merging.into.steps import Product, Replaced, RowsReplaced
from adapterkit.model import spelled_out
from adapterkit.tensor import same_bits

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from adapterkit.merging.into.steps import Step
    from adapterkit.merging.planning import Source

Array = np.ndarray[Any, np.dtype[Any]]

CHOICES = (None, "shared", "untie")


@dataclass(frozen=True, slots=True)
class Tying:
    """The table of a tied model.

    Attributes:
        embedding: stored name of the table.
        output: name that an output of its own has, or would have.
        stored: whether the checkpoint stores that copy too.
    """

    embedding: str
    output: str
    stored: bool


def check_choice(tied: str | None) -> None:
    """Refuse anything but the two ways.

    Raises:
        UsageError: if `tied` is none of them.
    """
    if tied not in CHOICES:
        raise UsageError(f"tied is {tied!r}; the two ways are shared and untie")


def as_spelled(sources: Sequence[Source], *, tied: bool | None, choice: str | None) -> list[Source]:
    """Return adapters whose tied updates count once, or for each table where there are two."""
    if tied and choice != "untie":
        return list(sources)
    return [replace(source, adapter=spelled_out(source.adapter)) for source in sources]


def resolved(
    steps: Mapping[str, list[Step]],
    tying: Tying,
    tied: str | None,
    sources: Sequence[Source],
) -> dict[str, list[Step]]:
    """Return the steps of the tables that will be stored.

    What every name of the table says alike, and what an adapter says of the table by its own
    config, is one change of the one table and needs no choice.

    Args:
        steps: by stored name, the output's under `tying.output`.
        tying: the names.
        tied: `shared` makes every change in the one table, `untie` gives the output one of its own.
        sources: the adapters, as `as_spelled` gives them.

    Raises:
        UnsupportedError: if the table is changed under one name and nobody said which way, or one
            adapter changes it in two ways and it is to be shared.
    """
    own = steps.get(tying.embedding, [])
    output = steps.get(tying.output, [])
    if not own and not output:
        return dict(steps)
    rest = {name: each for name, each in steps.items() if name != tying.output}
    if tied == "untie":
        # Without a change the output still needs a table: a copy of the embedding as it was.
        return {**rest, tying.output: [*_rows_of_both(own, output), *output]}
    both = {(source.label, table) for source in sources for table in source.adapter.tied}
    left = [step for step in output if not any(_same(step, other) for other in own)]
    alone = [step for step in own if not _of_both(step, both, output)]
    if tied is None and (alone or left):
        step = (alone or left)[0]
        raise UnsupportedError(
            "the base uses one table for the embedding and the output; --tied shared changes both, "
            "as training with tied weights did, --tied untie gives the output a table of its own",
            path=step.label,
            where=step.module,
        )
    for step in left:
        other = next((each for each in own if each.label == step.label), None)
        if other is not None:
            raise UnsupportedError(
                f"differs from {other.module}, so they cannot share a table; use --tied untie",
                path=step.label,
                where=step.module,
            )
    shared = [*own, *left]
    return {**rest, tying.embedding: shared, **({tying.output: shared} if tying.stored else {})}


def _of_both(step: Step, both: Collection[tuple[str, str]], output: Sequence[Step]) -> bool:
    """Tell whether a step of the embedding is one of the output too, whatever is chosen.

    PEFT ties rows of tokens without being asked, unless the output has rows of its own.
    """
    module = step.module.removesuffix(".weight")
    if (step.label, module) in both or any(_same(other, step) for other in output):
        return True
    own = any(isinstance(o, RowsReplaced) and o.label == step.label for o in output)
    return isinstance(step, RowsReplaced) and not own


def _rows_of_both(own: Sequence[Step], output: Sequence[Step]) -> list[Step]:
    """Return rows of tokens that are the output's too, which has none of its own."""
    having = {step.label for step in output if isinstance(step, RowsReplaced)}
    return [s for s in own if isinstance(s, RowsReplaced) and s.label not in having]


def _same(one: Step, other: Step) -> bool:
    """Tell whether an adapter says one thing under both names of a table, to the bit."""
    if one.label != other.label or one.weight != other.weight:
        return False
    match one, other:
        case (Product(), Product()):
            if one.magnitude or other.magnitude or one.pair.scale != other.pair.scale:
                return False
            first, second = _as_stored(one), _as_stored(other)
            return all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
        case (RowsReplaced(), RowsReplaced()):
            return one.tokens == other.tokens and same_bits(one.tensor, other.tensor)
        case (Replaced(), Replaced()):
            return same_bits(one.tensor, other.tensor)
        case _:
            return False


def _as_stored(step: Product) -> tuple[Array, Array]:
    """Return the factors in the orientation of the table."""
    a, b = step.pair.a.numpy(), step.pair.b.numpy()
    return (a.T, b.T) if step.turned else (b, a)
