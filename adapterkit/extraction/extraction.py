"""The adapter between two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adapterkit.base.model import BaseModel
from adapterkit.certificates import Making
from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.extraction.applied import check_applied
from adapterkit.extraction.assembly import assembled, fitting, saving
from adapterkit.extraction.checkpoints import open_both
from adapterkit.extraction.factors import Outcome, extract_tensor
from adapterkit.extraction.ranks import wish
from adapterkit.extraction.remarks import notes, warnings
from adapterkit.extraction.report import ExtractedModule, ExtractReport
from adapterkit.extraction.twins import Twin, twins
from adapterkit.formats.diffusion.on_base import flattened, from_base
from adapterkit.formats.protocol import FormatOptions
from adapterkit.model import AdapterTensorSet
from adapterkit.notes import first_and_more
from adapterkit.saving import admitted, destination_format, save, stored_type
from adapterkit.work import counter, in_threads


def extract(
    base: BaseModel | Path | str,
    tuned: BaseModel | Path | str,
    destination: Path | str,
    *,
    rank: int | str = "auto",
    tol: float | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    save_rest: bool = False,
    to: str | None = None,
    outtype: str = "auto",
    moe_layout: str | None = None,
    unverified: bool = False,
    allow_lossy: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    force: bool = False,
    proof: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Write the adapter that turns one checkpoint into another, and say what it does not hold.

    Every matrix of a linear layer or embedding gets the best factors B · A of ΔW = W_tuned - W_base
    (Eckart and Young 1936) by randomised subspace iteration (Halko, Martinsson and Tropp 2011) over
    blocks of rows; the error is measured against both checkpoints, not estimated. Of a model that
    an adapter was merged into, this is the adapter again.

    Args:
        base: Hugging Face directory, GGUF file or hub id, or such a model opened.
        tuned: the same model after training or merging, of the same kind.
        destination: file or directory to create.
        rank: of every module, or `auto`. No module gets ranks that are rounding of its stored type:
            their singular values are known to lie below max √(row variance) + max √(column
            variance). `auto` ends also where the rest looks like noise of any origin.
        tol: largest relative Frobenius error of a module, from which its rank follows.
        energy: smallest share of ‖ΔW‖² that is kept, the same as tol = √(1 - energy).
        max_rank: ranks that `auto` never exceeds; 256 by default without tol or energy.
        save_rest: store what is in no factors whole, as saved modules: norms, biases, tables of
            another vocabulary. By default they are left over, and the report names them.
        to: name of the format; by default a `.gguf` file is gguf and a directory is peft.
        outtype: `f32`, `f16`, `bf16`, `q8_0`; `auto` is the tuned weights' own 16 bits where they
            add less than 1 % to an error that is there anyway, such as that of a difference which
            holds the rounding of 16 bits already, and float32 elsewhere.
        moe_layout: `experts` or `fused`, where the target has two spellings.
        unverified: allow families without a passing engine test.
        allow_lossy: write the rest where the target cannot hold parts; the report lists them.
        seed: of the random directions; the result depends on it by less than its error.
        jobs: tensors at a time; by default one for each processor, 4 at most.
        force: replace the destination.
        proof: whether the file carries what it was made from and what it holds, for `verify`.
        progress: called with the bytes that are done, and all of them.

    Raises:
        UsageError: if arguments contradict each other.
        FormatError: if a checkpoint is malformed or incomplete, or holds NaN or infinity.
        IncompatibleBaseError: if the two are not the same model.
        UnsupportedError: if nothing differs, or nothing that an adapter can hold.
        DestinationExistsError: if the destination exists and `force` is false.
        WriteError: if the output cannot be written.
    """
    asked = wish(rank, tol, energy, max_rank)
    destination = Path(destination)
    target = destination_format(destination, to, force=force)
    dtype = stored_type(outtype)
    before, after = open_both(base, tuned)
    if save_rest and before.kind == "gguf":
        raise UsageError("whole parameters are saved from Hugging Face checkpoints only")
    factored = DType.F32 if dtype is not None and dtype.quantised else dtype
    work = partial(extract_tensor, asked=asked, seed=seed, dtype=factored)
    original = before
    if before.layout:
        before, after = flattened(before), flattened(after)
    found = twins(before, after, moe_layout or before.expert_layout)
    outcomes = _worked(found, work, jobs, progress)
    options = FormatOptions(base=before, dtype=dtype, moe_layout=moe_layout, unverified=unverified)
    outcomes = fitting(outcomes, before, target, options)
    if save_rest:
        outcomes = saving(outcomes, before, options)
    _check_any(outcomes, before, after, save_rest=save_rest)
    adapter, modules = assembled(outcomes, before, options)
    if original.layout:
        adapter, options = from_base(adapter, original), replace(options, base=None)
    ready = admitted(adapter, target, options, into=destination, allow_lossy=allow_lossy)
    said = {"rank": rank, "tol": tol, "energy": energy, "max_rank": max_rank, "seed": seed}
    making = Making("extract", {**said, "save_rest": save_rest}) if proof else None

    def accept(written: AdapterTensorSet) -> None:
        if not original.layout:
            check_applied(written, outcomes, after, path=destination)

    proven = save(
        ready.adapter,
        destination,
        target,
        options,
        force=force,
        spared=[after.path],
        accept=accept,
        making=making,
    )
    return ExtractReport(
        base=str(before.path),
        tuned=str(after.path),
        destination=str(destination),
        format=target.name,
        rank=asked.rule.rank or "auto",
        tolerance=asked.rule.tolerance or None,
        seed=seed,
        parameters=proven.parameters,
        bytes=proven.bytes,
        proof_error=proven.max_relative_error,
        losses=ready.losses,
        warnings=warnings(outcomes, asked),
        notes=(*notes(outcomes, before, after), *ready.warnings),
        **_found(outcomes, modules),
    )


def _found(outcomes: Sequence[Outcome], modules: Sequence[ExtractedModule]) -> dict[str, Any]:
    """Return the fields of the report that say what became of every tensor."""
    worst = max(modules, key=lambda module: module.relative_error, default=None)
    return {
        "modules": tuple(modules),
        "left_over": tuple(o.left for o in outcomes if o.left is not None),
        "equal": sum(1 for o in outcomes if o.module is None and o.left is None),
        "max_relative_error": worst.relative_error if worst else 0.0,
        "worst_module": worst.module if worst else None,
    }


def _worked(
    found: Sequence[Twin],
    work: Callable[[Twin], Outcome],
    jobs: int | None,
    progress: Callable[[int, int], None] | None,
) -> list[Outcome]:
    count = counter(sum(twin.nbytes for twin in found), progress)

    def one(twin: Twin) -> Outcome:
        outcome = work(twin)
        count(twin.nbytes)
        return outcome

    return in_threads(one, found, jobs)


def _check_any(
    outcomes: Sequence[Outcome], base: BaseModel, tuned: BaseModel, *, save_rest: bool
) -> None:
    """Refuse a difference without anything to write."""
    if any(o.module is not None or (o.left is not None and o.left.saved) for o in outcomes):
        return
    left = [outcome for outcome in outcomes if outcome.left is not None]
    if not left:
        message = f"holds the same weights as {base.path}: there is nothing to extract"
        raise UnsupportedError(message, path=tuned.path)
    if all(outcome.noise for outcome in left):
        raise UnsupportedError(
            f"differs from {base.path} in {len(left)} tensors, by no more than the rounding of "
            "their stored type: there is nothing to extract",
            path=tuned.path,
        )
    named = first_and_more([outcome.twin.name for outcome in left], 3)
    advice = f"; {left[0].left.reason}" if save_rest and left[0].left else ""
    advice = advice if save_rest else "; --save-rest stores them whole"
    raise UnsupportedError(
        f"differs from {base.path} only in what no factors hold: {named}{advice}",
        path=tuned.path,
    )
