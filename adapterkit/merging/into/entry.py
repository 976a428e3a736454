"""Adapters into a base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from adapterkit.base.model import BaseModel
from adapterkit.base.quantised import DecodedBase
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
from adapterkit.merging.into.journal import journalled, plan_hash
from adapterkit.merging.into.proving import model_proof
from adapterkit.merging.into.reading import read_sources
from adapterkit.merging.into.report import MergeIntoReport, TensorReport
from adapterkit.merging.into.reporting import order_counts, reported, with_decoded
from adapterkit.merging.into.ruled import rule_of, settings_of, shares
from adapterkit.merging.into.tokenizers import with_tokenizer
from adapterkit.merging.into.trained_on import beside_trained
from adapterkit.merging.into.tying import check_choice
from adapterkit.merging.into.whole_base import checked
from adapterkit.merging.into.write import Write
from adapterkit.merging.planning import Source
from adapterkit.merging.registry import remark
from adapterkit.model import AdapterTensorSet
from adapterkit.saving import stored_type
from adapterkit.several import each_of
from adapterkit.work import counter, threads


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
    sources = each_of(sources)
    how = rule_of(method, density, params, seed)
    weights = shares(weights, len(sources), how, normalize=normalize)
    check_choice(tied)
    calibration = None if calibrate is None else Path(calibrate)
    _check_blocks(gguf_type, rounding, calibration)
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
    write = Write(destination, threads(jobs), progress, resume, force, proven)
    # Each kind of base has much that the others never need.
    if opened.kind == "gguf":
        from adapterkit.merging.into.gguf_file import Allowed, merge_file

        allow = Allowed(requantise=allow_requantise, weak=allow_weak)
        tensors, more = merge_file(
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
        from adapterkit.merging.into.diffusion import merge_diffusion

        tensors, more = merge_diffusion(adapters, opened, write)
    else:
        stored = stored_type(dtype) if dtype else None
        tensors, more = _merge_directory(
            adapters, opened, write, how, dtype=stored, tied=tied, decoded=decoded
        )
        if decoded is None:
            tensors, apart = beside_trained(tensors, adapters, opened)
            more += apart
    said = remark(method) if method else None
    notes = (*([said] if said else []), *notes, *order_counts(adapters), *more)
    if dequantize and decoded is None:
        notes = (*notes, "the base is not quantised; dequantize changes nothing")
    report = replace(reported(adapters, opened, destination, tensors, notes), losses=dropped)
    return with_decoded(report, decoded) if decoded else report


def _directory(base: BaseModel) -> Directory | None:
    """Return the kind of directory that the merged model is; None for a file."""
    if base.kind == "gguf" or base.layout == "checkpoint":
        return None
    if not base.layout:
        return MODEL
    from adapterkit.merging.into.diffusion import MODEL as DIFFUSION

    return DIFFUSION


def _check_blocks(gguf_type: str | None, rounding: str | None, calibrate: Path | None) -> None:
    """Refuse types of GGUF and roundings to them that there are not."""
    if gguf_type is rounding is calibrate is None:
        return
    from adapterkit.merging.into.gguf import check_rounding, check_type

    check_type(gguf_type)
    check_rounding(rounding, gguf_type, calibrate)


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
    write: Write,
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
        key = plan_hash(sources, plan.spans, others, settings)
        count = counter(plan.nbytes, write.progress)
        with journalled(output, key) as journal:
            tensors = write_checkpoint(plan, output.path, journal, write.jobs, count)
            write.proven(output.path, tensors)
    left = [f"{path} is not copied: it holds the unmerged weights" for path in plan.left_out]
    return tensors, [*said, *_grown(plan), *left]


def _grown(plan: CheckpointPlan) -> list[str]:
    """Say that the vocabulary is another one."""
    before, now = plan.base.facts.get("vocab_size"), plan.config.get("vocab_size")
    if now is None or now == before:
        return []
    return [f"the vocabulary has {now} rows, {before} before: the adapter brings its own"]
