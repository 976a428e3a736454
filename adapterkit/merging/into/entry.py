"""Adapters into a base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from adapterkit.base.model import BaseModel
from adapterkit.base.quantised import DecodedBase
from adapterkit.certificates import ModelProof
from adapterkit.destination import Directory, check_destination
from adapterkit.dtype import DType
from adapterkit.errors import NotFoundError, UnsupportedError, UsageError
from adapterkit.keys import Role
from adapterkit.loading import open_model
from adapterkit.merging.combination import Combination
from adapterkit.merging.into.checkpoint import (
    MODEL,
    CheckpointPlan,
    plan_checkpoint,
    write_checkpoint,
)
from adapterkit.merging.into.diffusion import MODEL as DIFFUSION
from adapterkit.merging.into.diffusion import plan_diffusion, respelled, write_diffusion_base
from adapterkit.merging.into.gguf import MOST_ERROR, Allowed, check_rounding, check_type, plan_gguf
from adapterkit.merging.into.journal import journalled, plan_hash
from adapterkit.merging.into.proving import carry, model_proof, with_room
from adapterkit.merging.into.reading import read_sources
from adapterkit.merging.into.report import MergeIntoReport, TensorReport
from adapterkit.merging.into.ruled import rule_of, settings_of, shares
from adapterkit.merging.into.tokenizers import unplaced, with_tokenizer
from adapterkit.merging.into.trained_on import beside_trained
from adapterkit.merging.into.tying import check_choice
from adapterkit.merging.into.whole_base import checked
from adapterkit.merging.into.writing import SEGMENT, write_files
from adapterkit.merging.planning import Source
from adapterkit.merging.registry import remark
from adapterkit.model import AdapterTensorSet
from adapterkit.output import Output
from adapterkit.saving import stored_type
from adapterkit.work import counter, threads

_SURVIVAL = 0.95
# Errors of rounding, as a share of ‖ΔW‖, above which they are larger than the update.
_NOISE = 1.0


def merge_into(
    sources: Sequence[AdapterTensorSet | Path | str],
    base: BaseModel | Path | str,
    destination: Path | str,
    *,
    weights: Sequence[float] | None = None,
    method: str | None = None,
    density: float | None = None,
    params: Mapping[str, float] | None = None,
    seed: int | None = None,
    normalize: bool = False,
    dtype: DType | str | None = None,
    gguf_type: str | None = None,
    rounding: str | None = None,
    calibrate: Path | str | None = None,
    tied: str | None = None,
    dequantize: bool = False,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    allow_lossy: bool = False,
    allow_requantise: bool = False,
    allow_weak: bool = False,
    resume: bool = False,
    force: bool = False,
    proof: bool = True,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeIntoReport:
    """Add adapters to the weights of a base, streamed, and round every tensor once.

    W' = W + Σ wᵢ ΔWᵢ for low-rank updates, whatever their format. DoRA is applied as PEFT does with
    the adapters active in this order: each scales what is there so far, by a norm of the unmerged
    base. Whole parameters and token rows count as W + w (M - W). Everything that is not changed is
    copied as bytes; the output appears whole or not at all.

    Args:
        sources: adapters, any formats.
        base: Hugging Face directory or GGUF file; of the same kind is the output.
        destination: directory, or .gguf file, to create.
        weights: one for each adapter, 1 by default, used as they are; 1 / T by default for rules
            that average.
        method: a rule on entries (`ties`, `dare`, ...) that makes one update of those of all
            adapters for each stored tensor, exactly; by default their weighted sum.
        density: share of the entries that the rule keeps.
        params: the rule's other numbers.
        seed: of a random rule.
        normalize: divide the weights by their sum.
        dtype: `f32`, `f16` or `bf16` for all tensors of a Hugging Face model.
        gguf_type: `keep`, `f32`, `f16`, `bf16` or `q8_0` for changed tensors of a GGUF model; by
            default those four are kept and all other types become q8_0. One of llama.cpp's
            mixtures (`q4_k_m`, ...) quantises the whole merged model, of 16 or 32 bits before.
        rounding: `nearest`, or `shaped`, the default of `keep`: errors on block types of 4 to 6
            bits are kept away from the directions of the inputs that the adapter listens to.
        calibrate: with shaped rounding, a text in UTF-8, of which the layers' inputs are taken
            (needs transformers), or llama.cpp's imatrix in GGUF; by default the base draws tokens.
        tied: `shared` or `untie`, where the base has one table for embedding and output and it is
            changed.
        dequantize: decode a Hugging Face base that is quantised as fp8 or MXFP4, all of it, to 16
            bits or `dtype`, and add to the decoded values.
        dialect: key grammar of hand-written adapters, where the files cannot tell.
        alpha: scale numerator of adapters whose files do not hold it.
        as_format: name of the format to read all as, where their content does not tell.
        allow_lossy: leave out what the base has no place for (rows of a vocabulary, heads, biases,
            towers of a GGUF model), trained files beside an adapter, and what its config denies;
            losses name them.
        allow_requantise: quantise again what a GGUF base has quantised already, for a mixture.
        allow_weak: keep a GGUF type that loses much of the update.
        resume: go on where a killed merge with the same arguments ended.
        force: replace a file, or the parts of a model directory, that is there.
        proof: whether the model carries what it was made from and what it holds, for `verify`.
        jobs: tensors at a time; by default one for each processor, 4 at most.
        progress: called with the bytes that are done, and all of them.

    Raises:
        UsageError: if arguments contradict each other.
        FormatError: if a file is malformed, or holds NaN or infinity.
        UnsupportedError: if an adapter does not fit, the base is quantised, or a choice is missing.
        DestinationExistsError: if the destination exists.
        WriteError: if the output cannot be written.
    """
    how = rule_of(method, density, params, seed)
    weights = shares(weights, len(sources), how, normalize=normalize)
    check_choice(tied)
    check_type(gguf_type)
    calibration = None if calibrate is None else Path(calibrate)
    check_rounding(rounding, gguf_type, calibration)
    destination = Path(destination)
    opened = open_model(base)
    _check_places(opened, destination, dtype=dtype, gguf_type=gguf_type)
    if opened.kind == "hf" and (rounding is not None or calibrate is not None):
        raise UsageError("rounding is for GGUF bases", path=opened.path)
    if calibration is not None and not calibration.is_file():
        raise NotFoundError("is no file", path=calibration)
    check_destination(destination, force=force, directory=_directory(opened))
    if dequantize and opened.kind == "gguf":
        raise UsageError("dequantize is for Hugging Face bases; use gguf_type (--gguf-type)")
    original = opened
    plain = opened.kind == "hf" and not opened.layout
    decoded = checked(opened, dequantize=dequantize) if plain else None
    opened = decoded.base if decoded else opened
    adapters, opened, dropped, notes = read_sources(
        sources,
        weights,
        opened,
        dialect=dialect,
        alpha=alpha,
        as_format=as_format,
        allow_lossy=allow_lossy,
        growing=plain,
    )
    if not any(key.role is not Role.BASE_COPY for s in adapters for key in s.adapter.tensors):
        raise UnsupportedError("holds nothing that was trained", path=adapters[0].label)
    said = {
        "weights": [source.weight for source in adapters],
        "normalize": normalize,
        **settings_of(how),
        "dtype": stored_type(dtype) if dtype else None,
        "gguf_type": gguf_type,
        "rounding": rounding,
        "calibrate": calibration and calibration.name,
        "tied": tied,
        "dequantize": dequantize,
    }
    proven = model_proof(adapters, original, said) if proof else None
    write = _Write(destination, threads(jobs), progress, resume, force, proven)
    if opened.kind == "gguf":
        allow = Allowed(requantise=allow_requantise, weak=allow_weak)
        tensors, more = _merge_file(
            adapters,
            opened,
            write,
            allow,
            how,
            kind=gguf_type,
            tied=tied,
            rounding=rounding,
            calibrate=calibration,
        )
    elif opened.layout:
        adapters = respelled(adapters, opened)
        tensors, more = _merge_diffusion(adapters, opened, write)
    else:
        stored = stored_type(dtype) if dtype else None
        tensors, more = _merge_directory(
            adapters, opened, write, how, dtype=stored, tied=tied, decoded=decoded
        )
        if decoded is None:
            tensors, apart = beside_trained(tensors, adapters, opened)
            more += apart
    said = remark(method) if method else None
    notes = (*([said] if said else []), *notes, *_order(adapters), *more)
    if dequantize and decoded is None:
        notes = (*notes, "the base is not quantised; dequantize changes nothing")
    report = replace(_report(adapters, opened, destination, tensors, notes), losses=dropped)
    return _with_decoded(report, decoded) if decoded else report


@dataclass(frozen=True, slots=True)
class _Write:
    """How the output is written."""

    destination: Path
    jobs: int
    progress: Callable[[int, int], None] | None
    resume: bool
    force: bool
    proof: ModelProof | None

    def output(self, sources: Sequence[Source], directory: Directory | None = None) -> Output:
        """Return the destination; the adapters are not replaced by it."""
        read = [source.adapter.provenance for source in sources]
        return Output(
            self.destination,
            force=self.force,
            directory=directory,
            spared=[provenance.path for provenance in read if provenance],
            resume=self.resume,
        )


def _directory(base: BaseModel) -> Directory | None:
    """Return the kind of directory that the merged model is; None for a file."""
    if base.kind == "gguf" or base.layout == "checkpoint":
        return None
    return DIFFUSION if base.layout else MODEL


def _check_places(
    base: BaseModel, destination: Path, *, dtype: DType | str | None, gguf_type: str | None
) -> None:
    if base.layout and dtype is not None:
        raise UsageError("a diffusion model keeps its stored types; leave out dtype (--dtype)")
    if (base.layout == "checkpoint") != (destination.suffix == ".safetensors"):
        kind = "a single file: name a .safetensors file" if base.layout else "a directory: name one"
        raise UsageError(f"the base is {kind} to create", path=destination)
    if (base.kind == "gguf") != (destination.suffix == ".gguf"):
        kind = "a GGUF file: name a .gguf file" if base.kind == "gguf" else "a directory: name one"
        raise UsageError(f"the base is {kind} to create", path=destination)
    if base.kind == "gguf" and dtype is not None:
        raise UsageError("dtype is for Hugging Face bases; use gguf_type (--gguf-type)")
    if base.kind != "gguf" and gguf_type is not None:
        raise UsageError("gguf_type is for GGUF bases; use dtype (--dtype)")
    here, there = base.path.resolve(), destination.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UsageError("is the base itself, or inside it or around it", path=destination)


def _merge_directory(
    sources: Sequence[Source],
    base: BaseModel,
    write: _Write,
    how: Combination | None,
    *,
    dtype: DType | None,
    tied: str | None,
    decoded: DecodedBase | None,
) -> tuple[list[TensorReport], list[str]]:
    plan = plan_checkpoint(sources, base, dtype=dtype, tied=tied, decoded=decoded, how=how)
    plan, said = with_tokenizer(plan, sources)
    settings = {"dtype": dtype, "tied": tied, "dequantize": decoded is not None, **settings_of(how)}
    with write.output(sources, MODEL) as output:
        others = [plan.origin(path) for path in plan.others]
        key = plan_hash(sources, plan.spans, others, settings | {"segment": SEGMENT})
        count = counter(plan.nbytes, write.progress)
        with journalled(output, key) as journal:
            tensors = write_checkpoint(plan, output.path, journal, write.jobs, count)
            carry(write.proof, output.path, tensors)
    left = [f"{path} is not copied: it holds the unmerged weights" for path in plan.left_out]
    return tensors, [*said, *_grown(plan), *left]


def _grown(plan: CheckpointPlan) -> list[str]:
    """Say that the vocabulary is another one."""
    before, now = plan.base.facts.get("vocab_size"), plan.config.get("vocab_size")
    if now is None or now == before:
        return []
    return [f"the vocabulary has {now} rows, {before} before: the adapter brings its own"]


def _merge_diffusion(
    sources: Sequence[Source], base: BaseModel, write: _Write
) -> tuple[list[TensorReport], list[str]]:
    plan = plan_diffusion(sources, base)
    single = base.layout == "checkpoint"
    if single:
        plan = plan.named(write.destination.name)
    with write.output(sources, _directory(base)) as output:
        others = [base.path / path for path in plan.others]
        key = plan_hash(sources, plan.spans, others, {"segment": SEGMENT})
        count = counter(plan.nbytes, write.progress)
        folder = output.folder if single else output.path
        with journalled(output, key) as journal:
            tensors = write_diffusion_base(plan, folder, journal, write.jobs, count)
            carry(write.proof, output.path, tensors)
    left = [f"{path} is not copied: it holds the unmerged weights" for path in plan.left_out]
    return tensors, left


def _merge_file(
    sources: Sequence[Source],
    base: BaseModel,
    write: _Write,
    allow: Allowed,
    how: Combination | None,
    *,
    kind: str | None,
    tied: str | None,
    rounding: str | None,
    calibrate: Path | None,
) -> tuple[list[TensorReport], list[str]]:
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
        plan = with_room(write.proof, plan)
    file = plan.output(write.destination.name)
    settings = {"gguf_type": kind, "tied": tied, "segment": SEGMENT, "weak": allow.weak}
    settings["proof"] = write.proof is not None
    settings |= {"rounding": rounding, **settings_of(how)}
    if calibrate is not None:
        settings["calibrate"] = blake2b(calibrate.read_bytes()).hexdigest()
    with write.output(sources) as output:
        key = plan_hash(sources, file.spans(), (), settings)
        count = counter(sum(piece.nbytes for piece in file.pieces), write.progress)
        with journalled(output, key) as journal:
            tensors = write_files([file], output.folder, journal, write.jobs, count)
            carry(write.proof, output.path, tensors)
    return tensors, [*plan.notes, *unplaced(sources)]


def _report(
    sources: Sequence[Source],
    base: BaseModel,
    destination: Path,
    tensors: Sequence[TensorReport],
    notes: Sequence[str],
) -> MergeIntoReport:
    files = destination.rglob("*") if destination.is_dir() else [destination]
    survivals = [t.survival for t in tensors if t.survival is not None]
    return MergeIntoReport(
        sources=tuple(source.label for source in sources),
        weights=tuple(source.weight for source in sources),
        base=str(base.path),
        destination=str(destination),
        format="gguf" if base.kind == "gguf" else "safetensors",
        tensors=tuple(tensors),
        untouched=len(base.tensors.keys() - {tensor.tensor for tensor in tensors}),
        bytes=sum(file.stat().st_size for file in files if file.is_file()),
        min_survival=min(survivals, default=None),
        max_noise=max((t.noise for t in tensors if t.noise is not None), default=None),
        warnings=_warnings(tensors),
        notes=tuple(notes),
    )


def _with_decoded(report: MergeIntoReport, decoded: DecodedBase) -> MergeIntoReport:
    """Say what was decoded, and what is no longer there."""
    changed = {tensor.tensor for tensor in report.tensors}
    merely = [name for name in decoded.stored if name not in changed]
    notes: list[str] = []
    if decoded.left_out:
        kinds = Counter(name.rpartition(".")[2] for name in decoded.left_out)
        shown = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        notes = [f"left out, being about activations or the cache in 8 bits: {shown}"]
    return replace(
        report,
        untouched=report.untouched - len(merely),
        decoded=len(merely),
        left_out=decoded.left_out,
        notes=(*report.notes, *notes),
    )


def _order(sources: Sequence[Source]) -> list[str]:
    """Say that the order counts, where it does."""
    held = {key.role for source in sources for key in source.adapter.tensors}
    if len(sources) == 1 or not held & {Role.MAGNITUDE, Role.COLUMN_MAGNITUDE}:
        return []
    return ["DoRA scales what the adapters before it have made, as in PEFT: their order counts"]


def _warnings(tensors: Sequence[TensorReport]) -> tuple[str, ...]:
    # Shaped rounding trades survival for errors elsewhere; of it, the error along ΔW tells.
    low = [
        t
        for t in tensors
        if t.survival is not None
        and t.survival < _SURVIVAL
        and (t.direction_error is None or t.direction_error > MOST_ERROR)
    ]
    found: list[str] = []
    if low:
        worst = min(low, key=lambda t: t.survival or 0.0)
        found.append(
            f"less than {_SURVIVAL:.0%} of the update is left after rounding in {len(low)} of "
            f"{len(tensors)} tensors, least in {worst.tensor} "
            f"({max(worst.survival or 0.0, 0.0):.0%}); store a wider type"
        )
    # Of shaped rounding the error over all inputs alike is the price, not the fault.
    loud = [(t.noise, t) for t in tensors if t.nearest is None and (t.noise or 0.0) > _NOISE]
    if loud:
        noise, worst = max(loud, key=lambda pair: pair[0] or 0.0)
        found.append(
            f"rounding changes {len(loud)} of {len(tensors)} tensors by more than the update does, "
            f"most {worst.tensor} ({noise or 0.0:.3g} times ‖ΔW‖ as {worst.dtype}): what is "
            "left of the update stands in noise of that size; store a wider type"
        )
    return tuple(found)
