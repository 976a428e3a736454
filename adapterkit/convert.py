"""Convert an adapter: read, list what would be lost, write, prove, and only then keep the file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.base import open_base
from adapterkit.base.fit import check_fit
from adapterkit.base.initialisation import without_base_change
from adapterkit.base.vocabulary import matched
from adapterkit.dtype import DType
from adapterkit.errors import LossyConversionError, UsageError
from adapterkit.formats.protocol import Options
from adapterkit.hub import located
from adapterkit.model.defects import check_structure
from adapterkit.notes import Loss
from adapterkit.proof import prove
from adapterkit.reading import load
from adapterkit.registry import FormatSpec, destination_format, source_format
from adapterkit.serving import PREPARATIONS
from adapterkit.storage import staged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.model import AdapterTensorSet


OUTTYPES = {
    "auto": None,
    "f32": DType.F32,
    "f16": DType.F16,
    "bf16": DType.BF16,
    "q8_0": DType.Q8_0,
}


@dataclass(frozen=True, kw_only=True)
class ProvenFile:
    """What was written, as read back.

    Attributes:
        destination: path that was written.
        format: name of the format.
        modules: adapted modules.
        parameters: stored elements.
        bytes: size of the file, or of all files of the directory.
        max_relative_error: largest relative Frobenius error of an update, against what was to be
            written.
        worst_module: where that is.
    """

    destination: str
    format: str
    modules: int
    parameters: int
    bytes: int
    max_relative_error: float
    worst_module: str | None


@dataclass(frozen=True, kw_only=True)
class ConversionReport(ProvenFile):
    """What a conversion did and how it was proven.

    Attributes:
        source: path that was read.
        source_format: name of the format that was read.
        losses: what was dropped, with `allow_lossy`.
        notes: what was normalised on the way.
    """

    source: str
    source_format: str
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()


def convert(
    source: Path | str,
    destination: Path | str,
    *,
    to: str | None = None,
    base: Path | str | None = None,
    outtype: str = "auto",
    moe_layout: str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    unverified: bool = False,
    allow_lossy: bool = False,
    force: bool = False,
    prepare: Sequence[str] = (),
) -> ConversionReport:
    """Convert an adapter to another format, and prove on the written file that nothing changed.

    Args:
        source: adapter of any format that is read.
        destination: file or directory to create.
        to: name of the format; by default a `.gguf` file is gguf and a directory is peft.
        base: Hugging Face directory, config.json, GGUF file or cached hub id of the base model; by
            default the one that the adapter names, if it is in the local hub cache.
        outtype: `auto` keeps every factor's dtype; `f32`, `f16`, `bf16`, `q8_0`.
        moe_layout: `experts` or `fused`, where the target has two spellings.
        dialect: key grammar of a hand-written adapter, where the file cannot tell.
        alpha: scale numerator, where the file does not hold it.
        unverified: allow families without a passing engine test.
        allow_lossy: write the rest where the target cannot hold parts; the report lists them.
        force: replace an existing destination.
        prepare: exact changes to make first, by their names in adapterkit.serving.

    Raises:
        FormatError: if the source is malformed or broken.
        LossyConversionError: if the target cannot hold something; lists every reason.
        UnsupportedError: if the base is unknown, missing or another model, or the proof fails.
        DestinationExistsError: if the destination exists and `force` is false.
        WriteError: if the output cannot be written.
    """
    source, destination = located(source), Path(destination)
    target = destination_format(destination, to)
    options = Options(
        base=open_base(base) if base is not None else None,
        dtype=stored_type(outtype),
        moe_layout=moe_layout,
        unverified=unverified,
        dialect=dialect,
        alpha=alpha,
    )
    spec = source_format(source, dialect)
    adapter, options = load(source, spec, options)
    notes = list(adapter.provenance.notes if adapter.provenance else ())
    check_structure(adapter)
    if _undoes_base_change(target, options, given=base is not None):
        adapter = without_base_change(adapter, options.base)
        notes = list(adapter.provenance.notes if adapter.provenance else ())
    if options.base:
        adapter, changes = matched(adapter, options.base)
        notes += changes
    adapter, losses, warnings = admitted(adapter, target, options, allow_lossy=allow_lossy)
    ready = adapter
    for name in prepare:
        ready = PREPARATIONS[name](ready)
    proven = write_proven(ready, destination, target, options, force=force, against=adapter)
    return ConversionReport(
        **vars(proven),
        source=str(source),
        source_format=spec.name,
        losses=losses,
        notes=(*notes, *warnings),
    )


def write_proven(
    adapter: AdapterTensorSet,
    destination: Path,
    target: FormatSpec,
    options: Options,
    *,
    force: bool = False,
    against: AdapterTensorSet | None = None,
) -> ProvenFile:
    """Write an adapter, read the file back, compare every update, and only then keep it.

    Args:
        adapter: what to write.
        destination: file or directory to create.
        target: the format.
        options: base, dtype and layout to write with.
        force: replace an existing destination.
        against: what the file must be equal to, where `adapter` is a changed form of it.

    Raises:
        FormatError: if a factor of the adapter is not finite.
        ProofError: if the file does not hold the same updates; it is removed.
        DestinationExistsError: if the destination exists and `force` is false.
        WriteError: if the output cannot be written.
    """
    with staged(destination, force=force) as staging:
        target.format.write(adapter, staging, options)
        written = target.format.read(staging, replace(options, like=adapter.modules))
        worst, error = prove(against or adapter, written, path=destination)
        return ProvenFile(
            destination=str(destination),
            format=target.name,
            modules=len(written.modules),
            parameters=written.parameters,
            bytes=_size(staging),
            max_relative_error=error,
            worst_module=worst,
        )


def _undoes_base_change(target: FormatSpec, options: Options, *, given: bool) -> bool:
    """Tell whether PiSSA and the like become plain LoRA: where the base's weights are at hand.

    PEFT itself can hold them as they are; there it takes a base that was given, not one found.
    """
    weights = options.base is not None and options.base.kind == "hf" and options.base.has_tensors
    return weights and (given or target.name != "peft")


def stored_type(outtype: str) -> DType | None:
    """Return the stored type that an outtype means; None keeps each factor's.

    Raises:
        UsageError: if there is no such outtype; the message lists all.
    """
    if outtype not in OUTTYPES:
        raise UsageError(f"unknown outtype {outtype!r}; known: {', '.join(OUTTYPES)}")
    return OUTTYPES[outtype]


def admitted(
    adapter: AdapterTensorSet, target: FormatSpec, options: Options, *, allow_lossy: bool
) -> tuple[AdapterTensorSet, tuple[Loss, ...], tuple[str, ...]]:
    """Return what will be written, what is dropped and what to mention.

    Raises:
        FormatError: if the adapter is broken.
        IncompatibleBaseError: if it does not fit the base.
        LossyConversionError: if something would be lost and may not be; lists every reason.
    """
    path = adapter.provenance.path if adapter.provenance else None
    if options.base:
        check_fit(adapter, options.base)
    found = target.format.losses(adapter, options)
    losses = tuple(loss for loss in found if loss.blocks)
    if losses and not (allow_lossy and all(loss.droppable for loss in losses)):
        raise LossyConversionError(losses, path=path)
    warnings = tuple(f"{loss.subject}: {loss.message}" for loss in found if not loss.blocks)
    return _without(adapter, losses), losses, warnings


def _without(adapter: AdapterTensorSet, losses: Sequence[Loss]) -> AdapterTensorSet:
    dropped = {key for loss in losses for key in loss.drops}
    return adapter.replace(
        tensors={key: tensor for key, tensor in adapter.tensors.items() if key not in dropped}
    )


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
