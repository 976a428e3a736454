"""A GGUF model merged: one file, whose header is written anew."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from adapterkit.merging.into.gguf import Allowed, plan_gguf
from adapterkit.merging.into.journal import journalled, plan_hash
from adapterkit.merging.into.ruled import settings_of
from adapterkit.merging.into.tokenizers import unplaced
from adapterkit.merging.into.writing import write_files
from adapterkit.work import counter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapterkit.base.model import BaseModel
    from adapterkit.merging.combination import Combination
    from adapterkit.merging.into.report import TensorReport
    from adapterkit.merging.into.write import Write
    from adapterkit.merging.planning import Source


def merge_file(
    sources: Sequence[Source],
    base: BaseModel,
    write: Write,
    allow: Allowed,
    how: Combination | None,
    *,
    kind: str | None,
    tied: str | None,
    rounding: str | None,
    calibrate: Path | None,
) -> tuple[list[TensorReport], list[str]]:
    """Write a GGUF model with adapters merged into it.

    Args:
        sources: the adapters.
        base: the GGUF model.
        write: where to, and how.
        allow: what is refused else.
        how: a rule on entries; None for the weighted sum.
        kind: `gguf_type` of `merge_into`.
        tied: the same.
        rounding: the same.
        calibrate: the same.

    Raises:
        UnsupportedError: if an adapter does not fit, or too little of an update would be left.
    """
    plan = plan_gguf(
        sources,
        base,
        kind=kind,
        tied=tied,
        rounding=rounding,
        calibrate=calibrate,
        allow=allow,
        how=how,
    )
    if write.proof is not None:
        plan = write.proof.with_room(plan)
    file = plan.output(write.destination.name)
    settings = {"gguf_type": kind, "tied": tied, "weak": allow.weak}
    settings["proof"] = write.proof is not None
    settings |= {"rounding": rounding, **settings_of(how)}
    if calibrate is not None:
        settings["calibrate"] = blake2b(calibrate.read_bytes()).hexdigest()
    with write.output(sources) as output:
        key = plan_hash(sources, file.spans(), (), settings)
        count = counter(sum(piece.nbytes for piece in file.pieces), write.progress)
        with journalled(output, key) as journal:
            tensors = write_files([file], output.folder, journal, write.jobs, count)
            write.proven(output.path, tensors)
    return tensors, [*plan.notes, *unplaced(sources)]
