"""What was written, laid on the weights that its modules name, against the differences measured.

The error of an extraction is measured between two checkpoints, tensor by tensor; the file is proven
to hold the adapter that was assembled. Between the two lie names, orientation and order of rows:
here they are found again from the written names alone, the way that who loads the file finds them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import in_tower, to_engine
from adapterkit.base.places import Places
from adapterkit.errors import ProofError
from adapterkit.extraction.factors import as_stored
from adapterkit.lowrank.distances import distance, norm
from adapterkit.lowrank.products import updates
from adapterkit.proof import tolerance_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from adapterkit.base.model import BaseModel
    from adapterkit.extraction.factors import Outcome
    from adapterkit.lowrank.products import LowRank
    from adapterkit.model import AdapterTensorSet, Update

_STRANGER = "is no module of the model"


def check_applied(
    written: AdapterTensorSet, outcomes: Iterable[Outcome], base: BaseModel, *, path: Path
) -> None:
    """Compare each written update with the one measured for the tensor that its module names.

    Experts that the checkpoint spells in another layout are put together from several tensors, and
    are not compared here.

    Args:
        written: as it was read back.
        outcomes: what was extracted, by tensor of the tuned checkpoint.
        base: the tuned checkpoint.
        path: what was written, for messages.

    Raises:
        ProofError: if a module is none of the model, or its update is that of another weight.
    """
    measured: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.module is not None and not outcome.twin.respelled:
            measured[outcome.twin.name].append(outcome)
    for update, name, laid in _laid(written, base, path):
        # A table that the tuned model shares and the base does not was measured once for each use.
        uses = measured.get(name, [])
        alike = [each for each in uses if each.twin.embedding == update.embedding] or uses
        if not alike:
            continue
        outcome = alike[0]
        found = outcome.pairs[0]
        error = _apart(as_stored(outcome.twin, found), laid)
        stored = (update.a.dtype, update.b.dtype, found.a.dtype, found.b.dtype)
        if not error <= tolerance_for(stored):
            message = (
                f"is written as an update of {name}, and laid on it, it is off by {error:.3g} of "
                "what was measured there"
            )
            raise ProofError(message, path=path, where=update.module)


def _laid(
    written: AdapterTensorSet, base: BaseModel, path: Path
) -> Iterator[tuple[Update, str, list[LowRank]]]:
    """Yield each update with the tensor it goes onto, and its matrices as that is stored."""
    if base.kind == "gguf":
        mapped = to_engine(base.architecture, base.sizes, written.pairs(), base.tensors)
        if mapped.unmatched:
            raise ProofError(_STRANGER, path=path, where=mapped.unmatched[0])
        for part in mapped.pairs:
            laid = [each.turned if part.embedding else each for each in updates(part)]
            yield part, f"{part.module}.weight", laid
        return
    places = Places(base)
    for update in written.pairs():
        name = places.of(update.module)
        tower = base.architecture.known and in_tower(update.module)
        if name is None and places.has(update.module) is False and not tower:
            raise ProofError(_STRANGER, path=path, where=update.module)
        if name is None or name not in base.tensors:
            continue
        turned = places.turned(update, base.tensors[name], written)
        yield update, name, [each.turned if turned else each for each in updates(update)]


def _apart(measured: list[LowRank], laid: list[LowRank]) -> float:
    """Return how far matrices are from those that were measured, as a share of them."""
    if [each.shape for each in measured] != [each.shape for each in laid]:
        return math.inf
    apart = math.hypot(*(distance(*pair) for pair in zip(measured, laid, strict=True)))
    return apart / math.hypot(*map(norm, measured)) if apart else 0.0
