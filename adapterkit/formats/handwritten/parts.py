"""Fused layers whose parts share A, cut by the sizes of the base model: B's rows are the parts'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import BaseRequiredError, IncompatibleBaseError
from adapterkit.factors import take_rows
from adapterkit.formats.handwritten.blocks import Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.base import BaseModel
    from adapterkit.formats.handwritten.dialects import Document
    from adapterkit.formats.handwritten.dialects.grammar import PartRule
    from adapterkit.model import Update


def parted(
    pair: Update, rules: Sequence[PartRule], base: BaseModel | None, document: Document
) -> Slots:
    """Return the update of each part of a fused layer, its rows in the order of the part alone.

    Args:
        pair: factors A (r, in) and B (rows of all parts, r).
        rules: those that match the layer; the first whose rows add up is meant.
        base: the model, whose sizes the rows are.
        document: the file, for messages.

    Raises:
        BaseRequiredError: if no base is known, or it does not state a size.
        IncompatibleBaseError: if the rows add up by no rule.
    """
    if base is None:
        raise BaseRequiredError(
            f"holds {' and '.join(rules[0].rows)} in one layer, whose rows divide by the sizes of "
            "the base model; give its directory, config.json or GGUF with --base",
            path=document.path,
            where=pair.module,
        )
    base.architecture.require_known(base.path)
    total = pair.b.shape[0]
    expected: list[str] = []
    for rule in rules:
        repeats = base.sizes.value(rule.repeats)
        heights = {part: base.sizes.value(rows) for part, rows in rule.rows.items()}
        if repeats * sum(heights.values()) == total:
            pieces = _cut(pair, heights, repeats)
            return Slots(tuple(pieces), tuple(heights.values()), pieces, apart=True)
        expected.append(f"{' and '.join(heights)} {repeats * sum(heights.values())}")
    raise IncompatibleBaseError(
        f"has {total} rows, in the base {base.path} {', or '.join(expected)}; with fewer it is one "
        "tensor-parallel rank's part, which training can save whole",
        path=document.path,
        where=pair.module,
    )


def _cut(pair: Update, heights: dict[str, int], repeats: int) -> dict[str, Update]:
    import numpy as np

    grid = np.arange(pair.b.shape[0]).reshape(repeats, -1)
    ends = np.cumsum([0, *heights.values()])
    return {
        part: take_rows(pair, grid[:, begin:end].reshape(-1))
        for part, begin, end in zip(heights, ends[:-1], ends[1:], strict=True)
    }
