"""Exact truncation: the best factors of a smaller rank, and a proof of what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.base import BaseModel
from adapterkit.compressed import CompressedFile, CompressReport, CompressResult
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, ProofError, UncheckableError
from adapterkit.keys import Role
from adapterkit.loading import load
from adapterkit.lowrank.decomposition import EXACT_ZERO, decompose
from adapterkit.lowrank.distances import distance, norm
from adapterkit.lowrank.greedy import Candidate
from adapterkit.lowrank.planning import RankWish, planned
from adapterkit.lowrank.products import stored, unscaled, updates
from adapterkit.lowrank.rank_plan import RankPlan
from adapterkit.lowrank.spectrum import spectra
from adapterkit.model import AdapterTensorSet, Update
from adapterkit.proof import tolerance_for
from adapterkit.work import in_threads, watchable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.lowrank.products import Array, LowRank
    from adapterkit.tensor import LazyTensor


# A bound is kept to rounding of float64, which is also what an error of 0 means.
_SLACK, _ZERO = 1e-9, 1e-14


@watchable
def compress(
    source: AdapterTensorSet | Path | str,
    *,
    rank: int | None = None,
    tol: float | None = None,
    budget: int | None = None,
    policy: str | None = None,
    threshold: float | None = None,
    dtype: DType | str | None = None,
    base: BaseModel | Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CompressResult:
    """Cut every module to the rank that a plan gives it; no other factors of that rank are closer.

    Modules and scales stay; a module that keeps its rank keeps its bits. The new factors are
    B = U√Σ and A = √ΣVᵀ of the truncated singular value decomposition (Eckart and Young 1936).

    Args:
        source: an adapter in memory, or a file or directory of any format.
        rank: the largest rank of any module.
        tol: largest relative Frobenius error of all updates together, rounding to the stored type
            included; 0.1, of the truncation alone, without any wish.
        budget: largest number of parameters of all factors together.
        policy: `sv_ratio`, `sv_cumulative` or `sv_fro`, as kohya's resize_lora names them.
        threshold: the number that `policy` needs.
        dtype: stored type of the new factors; None keeps each one's, float32 for quantised ones.
        base: base model, where the update depends on it; by default the one that the adapter names,
            if it is in the local hub cache.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        FormatError: if the adapter is malformed, unpaired or not finite.
        ProofError: if the stored type cannot hold the new factors as precisely as predicted, or as
            `tol` asks.
        UsageError: if the wishes contradict each other.
        UnsupportedError: if B · A is no update of the original base, and that base is not at hand.
    """
    del progress  # told by `watchable`
    from adapterkit.saving import stored_type

    whole = load(source, base=base).adapter
    return _compressed(
        whole,
        stored_type(dtype),
        RankWish(rank=rank, tol=tol, budget=budget, policy=policy, threshold=threshold),
    )


def _compressed(whole: AdapterTensorSet, dtype: DType | None, wish: RankWish) -> CompressResult:
    """Cut an adapter that is whole and plain.

    Raises:
        FormatError: if a factor is not finite.
        ProofError: if the stored type cannot hold the new factors as precisely as predicted.
        UsageError: if the budget is below rank 1 everywhere.
    """
    pairs, tol = list(whole.pairs()), wish.tol
    wanted = _candidates(pairs, whole)
    plan = planned(wanted, wish)
    cut, measured = _cut_to(plan, pairs, dtype)
    if tol is not None and measured > max(tol * (1 + _SLACK), _ZERO):
        # What rounding takes is left out of what truncation may.
        rounding = max(measured**2 - plan.relative_error**2, 0.0)
        if rounding < tol**2:
            plan = planned(wanted, replace(wish, tol=(tol**2 - rounding) ** 0.5))
            cut, measured = _cut_to(plan, pairs, dtype)
        _check_bound(tol, measured, rounding**0.5, whole)
    result = whole.updated(cut)
    changed = [new for old, new in zip(pairs, cut, strict=True) if new is not old]
    _check(plan.relative_error, measured, changed, whole)
    return CompressResult(
        result,
        CompressReport(
            policy=plan.policy if tol is None else f"relative error at most {tol:g}",
            parameters_before=plan.parameters_before,
            parameters=plan.parameters,
            predicted_error=plan.relative_error,
            measured_error=measured,
            max_module_error=plan.max_module_error,
            modules=plan.modules,
            notes=tuple(_notes(whole)),
        ),
    )


def _candidates(pairs: Sequence[Update], whole: AdapterTensorSet) -> list[Candidate]:
    path = whole.provenance.path if whole.provenance else None
    if not pairs:
        message = "holds no low-rank factors to cut; `adapterkit inspect` shows what it holds"
        raise UncheckableError(message, path=path)
    try:
        return in_threads(_candidate, pairs)
    except FormatError as error:
        if path is None or error.path is not None:
            raise
        raise FormatError(error.message, path=path, where=error.where) from None


def _candidate(pair: Update) -> Candidate:
    values = np.array([each.values for each in spectra(pair)], dtype=np.float64)
    cost = pair.experts * sum(pair.matrix_shape)
    return Candidate(pair.module, pair.rank, pair.scale, cost, values)


def _cut_to(
    plan: RankPlan, pairs: Sequence[Update], dtype: DType | None
) -> tuple[list[Update], float]:
    """Return the updates at the planned ranks, and what all of them together are off by."""
    ranks = plan.ranks
    cut = in_threads(lambda pair: truncated(pair, ranks[pair.module], dtype), pairs)
    return cut, _apart(pairs, cut)


def _check_bound(tol: float, measured: float, rounding: float, whole: AdapterTensorSet) -> None:
    if measured <= max(tol * (1 + _SLACK), _ZERO):
        return
    raise ProofError(
        f"new factors in the stored type are rounded, a relative error of {rounding:.2g}, and the "
        f"tol is {tol:g}; give a larger one, or try --outtype f32",
        path=whole.provenance.path if whole.provenance else None,
    )


@watchable
def compress_file(
    source: AdapterTensorSet | Path | str,
    destination: Path | str,
    *,
    rank: int | None = None,
    tol: float | None = None,
    budget: int | None = None,
    policy: str | None = None,
    threshold: float | None = None,
    to: str | None = None,
    base: BaseModel | Path | str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    outtype: str = "auto",
    unverified: bool = False,
    allow_lossy: bool = False,
    force: bool = False,
    proof: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> CompressedFile:
    """Compress an adapter into a file of any format, proven as a conversion is.

    Args:
        source: adapter of any format that is read, or one in memory.
        destination: file or directory to create.
        rank: as `compress`, like the next four.
        tol: see above.
        budget: see above.
        policy: see above.
        threshold: see above.
        to: name of the format; by default a `.gguf` file is gguf and a directory is peft.
        base: base model, where a format needs it.
        dialect: key grammar of a hand-written adapter, where the file cannot tell.
        alpha: scale numerator, where the file does not hold it.
        as_format: name of the format to read it as, where its content does not tell.
        outtype: `auto` keeps every factor's dtype; `f32`, `f16`, `bf16`, `q8_0`.
        unverified: allow families without a passing engine test.
        allow_lossy: write the rest where the target cannot hold parts; the report lists them.
        force: replace an existing destination.
        proof: whether the file carries what it was made from and what it holds, for `verify`.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        FormatError: if the source is malformed, unpaired or not finite.
        LossyConversionError: if the target cannot hold something; lists every reason.
        UsageError: if the wishes contradict each other.
        UnsupportedError: if the base is unknown, missing or another model, or the proof fails.
        DestinationExistsError: if the destination exists and `force` is false.
        WriteError: if the output cannot be written.
    """
    del progress  # told by `watchable`
    from adapterkit.certificates import Making
    from adapterkit.saving import admitted, destination_format, save, stored_type

    wish = RankWish(rank=rank, tol=tol, budget=budget, policy=policy, threshold=threshold)
    destination = Path(destination)
    target = destination_format(destination, to, force=force)
    dtype = stored_type(outtype)
    loaded = load(
        source,
        base=base,
        dialect=dialect,
        alpha=alpha,
        as_format=as_format,
        allow_lossy=allow_lossy,
    )
    options = replace(loaded.options, dtype=dtype, unverified=unverified)
    # What the target cannot hold is refused before any work.
    ready = admitted(
        loaded.adapter,
        target,
        options,
        allow_lossy=allow_lossy,
        into=destination,
        passed=loaded.losses,
    )
    result = _compressed(
        ready.adapter,
        None if dtype is None or dtype.quantised else dtype,
        wish,
    )
    made_from = [loaded.source.path] if loaded.source else []
    making = Making("compress", asdict(wish), made_from) if proof else None
    proven = save(result.adapter, destination, target, options, force=force, making=making)
    return CompressedFile(
        source=loaded.label,
        destination=str(destination),
        format=target.name,
        bytes_before=sum(tensor.nbytes for tensor in ready.adapter.tensors.values()),
        bytes=proven.bytes,
        max_relative_error=proven.max_relative_error,
        worst_module=proven.worst_module,
        report=result.report,
        losses=ready.losses,
        notes=(*loaded.told, *ready.warnings),
    )


def truncated(pair: Update, rank: int, dtype: DType | None = None) -> Update:
    """Return the pair with the best factors of a rank; itself if it has no more than that rank.

    Args:
        pair: the update; experts are cut one by one.
        rank: new inner dimension.
        dtype: stored type of the new factors; None keeps each one's.
    """
    if rank >= pair.rank:
        return pair
    cut = [_cut(each, rank) for each in unscaled(pair)]
    a, b = (np.stack(parts) for parts in zip(*cut, strict=True))
    a_shape, b_shape = pair.factor_shapes(rank)
    return replace(
        pair,
        a=_stored(a.reshape(a_shape), pair.a, pair.module, dtype),
        b=_stored(b.reshape(b_shape), pair.b, pair.module, dtype),
    )


def _stored(values: Array, like: LazyTensor, module: str, dtype: DType | None) -> LazyTensor:
    """Return a new factor in the type of the old one.

    Raises:
        ProofError: if the stored type loses more of it than its rounding explains.
    """
    kind = dtype or (DType.F32 if like.dtype.quantised else like.dtype)
    new = stored(values, kind)
    apart = float(np.linalg.norm(new.numpy().astype(np.float64) - values))
    # The factors are balanced, so what a factor loses the update loses.
    if not apart <= tolerance_for([kind]) * float(np.linalg.norm(values)):
        message = f"the new factors do not fit into {kind} (too small or too large); "
        raise ProofError(message + "try --outtype f32", where=module)
    return new


def _cut(each: LowRank, rank: int) -> tuple[Array, Array]:
    """Return A (rank, in) and B (out, rank) of the truncated B·A."""
    found = decompose(each, EXACT_ZERO)
    if not found.values.size:
        # A zero update keeps rows of A: with both factors zero it could never be trained.
        return each.a[:rank], np.zeros((each.b.shape[0], rank))
    b, a = found.factors(rank)
    return a, b


def _apart(first: Sequence[Update], second: Sequence[Update]) -> float:
    """Return ‖ΔW₁ - ΔW₂‖ / ‖ΔW₁‖, Frobenius, over all modules; 0 for two zero updates."""
    parts = in_threads(lambda pair: _squares(*pair), list(zip(first, second, strict=True)))
    total = sum(norm for _, norm in parts)
    return (sum(apart for apart, _ in parts) / total) ** 0.5 if total else 0.0


def _squares(first: Update, second: Update) -> tuple[float, float]:
    if first is second:
        return 0.0, sum(norm(one) ** 2 for one in updates(first))
    apart = whole = 0.0
    for one, other in zip(updates(first), updates(second), strict=True):
        apart += distance(one, other) ** 2
        whole += norm(one) ** 2
    return apart, whole


def _check(
    predicted: float, measured: float, changed: Sequence[Update], whole: AdapterTensorSet
) -> None:
    if not changed:
        return
    allowed = tolerance_for(tensor.dtype for pair in changed for tensor in (pair.a, pair.b))
    if not abs(measured - predicted) <= allowed:
        raise ProofError(
            f"relative error {measured:.4g} after truncation, predicted {predicted:.4g}: more than "
            f"{allowed:g} that rounding to the stored dtype explains; try --outtype f32",
            path=whole.provenance.path if whole.provenance else None,
        )


def _notes(whole: AdapterTensorSet) -> list[str]:
    notes: list[str] = []
    if any(key.role in {Role.MAGNITUDE, Role.COLUMN_MAGNITUDE} for key in whole.tensors):
        notes.append("DoRA: the error is that of B · A; magnitudes are kept as they are")
    return notes
