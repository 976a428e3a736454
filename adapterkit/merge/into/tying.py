"""An embedding and an output that share one table, and are changed apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.merge.into.steps import Replaced

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.merge.into.steps import Step

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


def resolved(
    steps: Mapping[str, list[Step]], tying: Tying, tied: str | None
) -> dict[str, list[Step]]:
    """Return the steps of the tables that will be stored.

    Args:
        steps: by stored name, the output's under `tying.output`.
        tying: the names.
        tied: `shared` makes every change in the one table, `untie` gives the output one of its own.

    Raises:
        UnsupportedError: if the table is changed and nobody said which way, or two whole tables
            want to be the shared one.
    """
    own = steps.get(tying.embedding, [])
    output = steps.get(tying.output, [])
    if not own and not output:
        return dict(steps)
    label = (own or output)[0].label
    if tied is None:
        raise UnsupportedError(
            "the base uses one table for the embedding and the output; --tied shared changes both, "
            "as training with tied weights did, --tied untie gives the output a table of its own",
            path=label,
            where=(own or output)[0].module,
        )
    rest = {name: each for name, each in steps.items() if name != tying.output}
    if tied == "untie":
        # Without a change the output still needs a table: a copy of the embedding as it was.
        return {**rest, tying.output: output}
    both = _without_copies(own, output)
    return {**rest, tying.embedding: both, **({tying.output: both} if tying.stored else {})}


def _without_copies(own: list[Step], output: list[Step]) -> list[Step]:
    """Return the changes of both; a table that an adapter saved under both names counts once."""
    both = list(own)
    for step in output:
        twin = next(
            (o for o in own if isinstance(o, Replaced) and o.label == step.label),
            None,
        )
        if isinstance(step, Replaced) and twin is not None:
            if bytes(step.tensor.tobytes()) != bytes(twin.tensor.tobytes()):
                raise UnsupportedError(
                    f"differs from {twin.module}, so they cannot share a table; use --tied untie",
                    path=step.label,
                    where=step.module,
                )
            continue
        both.append(step)
    return both
