"""Audit adapters: every module's spectrum, the adapter as a whole, one against another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapterkit.attempts import Attempt, attempted
from adapterkit.auditing.aggregate import families_of, layer_shares, summarise
from adapterkit.auditing.interference import Interference
from adapterkit.auditing.metrics import Shape, hoyer, shape_of, storage_epsilon, top_share
from adapterkit.auditing.null_model import null_model
from adapterkit.auditing.outliers import with_scores
from adapterkit.auditing.places import place_of
from adapterkit.auditing.report import AdapterAudit, AuditReport, ModuleAudit, Unaudited
from adapterkit.base import BaseModel
from adapterkit.errors import FormatError, UncheckableError, UsageError
from adapterkit.keys import PARTNERS, Role, TensorKey
from adapterkit.loading import Loaded, load_all, open_model
from adapterkit.lowrank.rank_plan import Suggestion
from adapterkit.lowrank.spectrum import Spectrum, spectra
from adapterkit.model import AdapterTensorSet, Update
from adapterkit.several import Said, named, said_of_each
from adapterkit.work import in_threads, watchable

_REASONS = {
    Role.MAGNITUDE: "DoRA's magnitude acts on base and update together; the base is needed",
    Role.COLUMN_MAGNITUDE: "DoRA's magnitude acts on base and update together",
    Role.LORA_BIAS: "a bias is no part of the weight's update",
    Role.FULL: "stored whole; what it changes depends on the base",
    Role.TOKEN_ROWS: "rows stored whole; what they change depends on the base",
}

_Measured = TypeVar("_Measured")
_NO_WEIGHTS = "there are no weights, so no update is held against them"


@watchable
def audit(
    *sources: AdapterTensorSet | Path | str,
    suggest: bool = False,
    budget: int | None = None,
    tol: float | None = None,
    base: BaseModel | Path | str | None = None,
    exact: bool = False,
    reference: Path | str | None = None,
    keep_going: bool = False,
    jobs: int | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AuditReport:
    """Measure adapters from their factors alone; several are also held against each other.

    Args:
        sources: files or directories of any format that is read, or adapters in memory.
        suggest: whether to advise ranks.
        budget: parameters that the advised ranks may cost.
        tol: relative error that the advised ranks may make.
        base: base model. With weights, every update is measured against its weight; a
            config.json serves formats that cannot be read without. By default none is opened but
            the one that an adapter names, if it is in the local hub cache: to read with, and to
            make plain what was trained on a base that its initialisation changed.
        exact: whether to find intruder dimensions by their definition, which takes hours for a
            large base.
        reference: bank of adapters to compare with, as `bank` writes it.
        keep_going: whether one of several that cannot be audited is left out and listed instead of
            ending it all.
        jobs: modules at a time; by default one for each processor, up to four.
        dialect: key grammar of a hand-written adapter, where the file cannot tell.
        alpha: scale numerator, where the file does not hold it.
        as_format: name of the format to read them as, where their content does not tell.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        FormatError: if there is no adapter, or it is malformed, unpaired or not finite.
        UncheckableError: if it holds no factors, or two adapters cannot be compared.
        UsageError: if no adapter is given, `budget` and `tol` both are, or `exact` without weights.
        UnsupportedError: if the base does not fit, or B · A is no update of the original base and
            that base is not at hand.
    """
    del progress  # told by `watchable`
    if not sources:
        raise UsageError("no adapter was given")
    model = open_model(base)
    if exact and (model is None or not model.has_tensors):
        raise UsageError("the exact test needs the weights of a base")
    read = partial(
        load_all,
        base=_in_floats(model),
        dialect=dialect,
        alpha=alpha,
        as_format=as_format,
    )

    def measured(adapter: AdapterTensorSet) -> AdapterAudit:
        audited = _with_base(audit_one(adapter, jobs), adapter, model, exact=exact)
        return audited if reference is None else _with_reference(audited, adapter, reference)

    if not keep_going:
        loaded = [each.adapter for each in read(sources)]
        audits = map(_renamed, _once(loaded, measured), loaded)
        return _report(list(zip(loaded, audits, strict=True)), (), suggest, budget, tol)
    said = said_of_each(sources, base=model, dialect=dialect, alpha=alpha, as_format=as_format)
    sound, failed = _sound(sources, said, read)
    done: list[tuple[AdapterTensorSet, AdapterAudit]] = []
    attempts = _once([each for _, each in sound], lambda each: attempted("", measured, each))
    for (name, adapter), attempt in zip(sound, attempts, strict=True):
        if attempt.result:
            done.append((adapter, _renamed(attempt.result, adapter)))
        else:
            failed.append(replace(attempt, source=name))
    return _report(done, failed, suggest, budget, tol)


def _in_floats(model: BaseModel | None) -> BaseModel | None:
    if model is None:
        return None
    from adapterkit.base.quantised import as_floats

    return as_floats(model)


def _report(
    done: Sequence[tuple[AdapterTensorSet, AdapterAudit]],
    failed: Sequence[Attempt[AdapterAudit]],
    suggest: bool,
    budget: int | None,
    tol: float | None,
) -> AuditReport:
    audits = tuple(audited for _, audited in done)
    return AuditReport(
        adapters=audits,
        suggestions=_suggestions(audits, budget, tol) if suggest else (),
        interference=_interference([a for a, _ in done], audits) if len(done) > 1 else None,
        failed=tuple(failed),
    )


def _sound(
    adapters: Sequence[AdapterTensorSet | Path | str],
    said: Sequence[Said],
    read: Callable[..., Sequence[Loaded]],
) -> tuple[list[tuple[str, AdapterTensorSet]], list[Attempt[AdapterAudit]]]:
    """Return the adapters that can be read, with their names, and why the others cannot."""
    alone = [
        attempted(each, read, [each], dialect=own.dialect, alpha=own.alpha)
        for each, own in zip(adapters, said, strict=True)
    ]
    kept = [each for each, attempt in zip(adapters, alone, strict=True) if attempt.error is None]
    failed: list[Attempt[AdapterAudit]] = []
    failed += [Attempt(a.source, error=a.error) for a in alone if a.error]
    # Read together: what one of them names as its base serves all.
    loaded = [each.adapter for each in read(kept)]
    apart = _unlike(loaded) if len(loaded) > 1 else {}
    failed += [Attempt(named(kept[number]), error=error) for number, error in apart.items()]
    sound = list(zip(map(named, kept), loaded, strict=True))
    return [each for number, each in enumerate(sound) if number not in apart], failed


def _once(
    adapters: Sequence[AdapterTensorSet], measure: Callable[[AdapterTensorSet], _Measured]
) -> list[_Measured]:
    """Measure every adapter; copies of one, bit for bit, are measured once."""
    from adapterkit.auditing.sketches import copies

    found: dict[int, _Measured] = {}
    for group in copies(adapters) if len(adapters) > 1 else [tuple(range(len(adapters)))]:
        if group:
            found |= dict.fromkeys(group, measure(adapters[group[0]]))
    return [found[number] for number in range(len(adapters))]


def _renamed(audited: AdapterAudit, adapter: AdapterTensorSet) -> AdapterAudit:
    """Return the audit of a copy, which has a name and notes of its own."""
    provenance = adapter.provenance
    notes = [*(provenance.notes if provenance else ()), *_beside(adapter)]
    ours = [note for note in audited.notes if note.endswith(_NO_WEIGHTS)]
    return replace(
        audited,
        source=str(provenance.path) if provenance else None,
        format=provenance.format if provenance else None,
        base_model=adapter.base.name,
        notes=(*notes, *ours),
    )


def _suggestions(
    audits: Sequence[AdapterAudit], budget: int | None, tol: float | None
) -> tuple[Suggestion, ...]:
    from adapterkit.auditing.plan import suggestion

    return tuple(suggestion(each, budget=budget, tol=tol) for each in audits)


def _unlike(adapters: Sequence[AdapterTensorSet]) -> dict[int, UncheckableError]:
    from adapterkit.auditing.pairwise import unlike

    return unlike(adapters)


def _interference(
    adapters: Sequence[AdapterTensorSet], audits: Sequence[AdapterAudit]
) -> Interference:
    from adapterkit.auditing.pairwise import interference

    return interference(adapters, audits)


def _with_reference(
    audited: AdapterAudit, adapter: AdapterTensorSet, reference: Path | str
) -> AdapterAudit:
    from adapterkit.auditing.reference_bank import against_bank

    return replace(audited, reference=against_bank(adapter, reference))


def _with_base(
    audited: AdapterAudit, adapter: AdapterTensorSet, base: BaseModel | None, *, exact: bool
) -> AdapterAudit:
    if base is None:
        return audited
    if not base.has_tensors:
        return replace(audited, notes=(*audited.notes, f"{base.path}: {_NO_WEIGHTS}"))
    from adapterkit.auditing.against_base import against_base

    return replace(audited, base=against_base(adapter, base, exact=exact))


def audit_one(adapter: AdapterTensorSet, jobs: int | None = None) -> AdapterAudit:
    """Measure one adapter; tensors are read once, a few modules at a time.

    Raises:
        FormatError: if a factor is not finite.
        UncheckableError: if there are no factors.
    """
    path = adapter.provenance.path if adapter.provenance else None
    pairs = list(adapter.pairs())
    if not pairs:
        message = "holds no low-rank factors to audit; `adapterkit inspect` shows what it holds"
        raise UncheckableError(message, path=path)
    norms = {Role.MAGNITUDE, Role.COLUMN_MAGNITUDE}
    magnitudes = {key.module for key in adapter.tensors if key.role in norms}

    def measured(pair: Update) -> list[ModuleAudit]:
        return _measured(pair, low_rank_only=pair.module in magnitudes)

    try:
        rows = [row for group in in_threads(measured, pairs, jobs) for row in group]
    except FormatError as error:
        if path is None or error.path is not None:
            raise
        raise FormatError(error.message, path=path, where=error.where) from None
    modules = tuple(with_scores(rows))
    layers = layer_shares(modules)
    return AdapterAudit(
        source=str(path) if path else None,
        format=adapter.provenance.format if adapter.provenance else None,
        base_model=adapter.base.name,
        dtypes=tuple(sorted({t.dtype.value for pair in pairs for t in (pair.a, pair.b)})),
        bytes=sum(tensor.nbytes for tensor in adapter.tensors.values()),
        tensors=len(adapter.tensors),
        unaudited=tuple(_unaudited(adapter.tensors)),
        notes=(*(adapter.provenance.notes if adapter.provenance else ()), *_beside(adapter)),
        health=tuple(_health(modules)),
        summary=summarise(modules, layers),
        families=families_of(modules),
        layers=layers,
        modules=modules,
    )


def _measured(pair: Update, *, low_rank_only: bool) -> list[ModuleAudit]:
    return [_module(pair, each, low_rank_only=low_rank_only) for each in spectra(pair)]


def _module(pair: Update, spectrum: Spectrum, *, low_rank_only: bool) -> ModuleAudit:
    place, rank, size = place_of(pair.module), pair.rank, pair.matrix_shape
    epsilon = storage_epsilon(pair.a.dtype, pair.b.dtype)
    shape = shape_of(spectrum.relative, rank=rank, size=size, epsilon=epsilon)
    values = spectrum.values
    frobenius = spectrum.largest * float((spectrum.relative**2).sum()) ** 0.5
    null = null_model(*size, rank).stable_rank if shape else 0.0
    kinds = dict.fromkeys((pair.a.dtype.value, pair.b.dtype.value))
    return ModuleAudit(
        module=pair.module,
        expert=spectrum.expert,
        family=place.family,
        stack=place.stack,
        layer=place.layer,
        shape=size,
        rank=rank,
        scale=pair.scale,
        parameters=(pair.a.size + pair.b.size) // pair.experts,
        dtype="/".join(kinds),
        state="trained" if shape else "untrained",
        low_rank_only=low_rank_only,
        singular_values=tuple(values.tolist()),
        spectral_norm=spectrum.largest,
        frobenius_norm=frobenius,
        nuclear_norm=float(values.sum()),
        rms=frobenius / (size[0] * size[1]) ** 0.5,
        null_ratio=shape.stable_rank / null if shape else None,
        row_hoyer=hoyer(spectrum.rows),
        row_top8=top_share(spectrum.rows),
        column_hoyer=hoyer(spectrum.columns),
        column_top8=top_share(spectrum.columns),
        balance=spectrum.balance,
        **_fields(shape),
    )


def _fields(shape: Shape | None) -> dict[str, Any]:
    return {name: getattr(shape, name) if shape else None for name in Shape.__slots__}


def _unaudited(keys: Iterable[TensorKey]) -> Iterable[Unaudited]:
    for key in keys:
        if key.role not in PARTNERS:
            yield Unaudited(str(key), _REASONS.get(key.role, "is no factor of a low-rank update"))


def _health(modules: tuple[ModuleAudit, ...]) -> Iterable[str]:
    count = len(modules)
    untrained = sum(module.state == "untrained" for module in modules)
    if untrained == count:
        yield f"untrained: all {count} updates are zero"
    elif untrained:
        first = next(module.name for module in modules if module.state == "untrained")
        yield f"untrained: {untrained} of {count} updates are zero, the first is {first}"
    deficient = [m for m in modules if m.numerical_rank and m.numerical_rank < m.rank]
    if deficient:
        low = deficient[0]
        yield (
            f"rank-deficient: {len(deficient)} of {count} updates, such as {low.name} of rank "
            f"{low.numerical_rank} in factors of {low.rank}; compress loses nothing there"
        )
    partly = sum(module.low_rank_only for module in modules)
    if partly:
        yield f"DoRA: {partly} of {count} updates are audited without their magnitude"


def _beside(adapter: AdapterTensorSet) -> list[str]:
    files = [file for file in adapter.beside if file.trained]
    return [f"{file.name} ({file.what}) lies beside it and is not measured" for file in files]
