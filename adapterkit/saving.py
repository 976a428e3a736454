"""The one way out: what may be written, written beside, read back, proven, and only then kept."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.advice import MERGE
from adapterkit.beside import lying_beside
from adapterkit.certificates import certified
from adapterkit.destination import check_destination
from adapterkit.dtype import DType
from adapterkit.errors import (
    LossyConversionError,
    UnsupportedError,
    UsageError,
    unknown,
)
from adapterkit.formats.builtin import BUILTIN
from adapterkit.keys import Role, is_one_expert
from adapterkit.lowrank.effect import IDLE, idle
from adapterkit.model import AdapterTensorSet, BesideKind, Kind
from adapterkit.model.beside import MOST_NAMED
from adapterkit.model.losses import OTHER_TABLE
from adapterkit.notes import Loss, first_and_more
from adapterkit.output import staged
from adapterkit.passes.protocol import Context
from adapterkit.passes.registry import by_name
from adapterkit.proof import prove
from adapterkit.registry import by_suffix, directory_of, formats, spec
from adapterkit.stamps import carry
from adapterkit.storage import FileSlice
from adapterkit.text import PLAIN, Pen, Shown, count, line, printable, short, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from adapterkit.certificates import Making
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.formats.spec import FormatSpec

OUTTYPES = {
    "auto": None,
    "f32": DType.F32,
    "f16": DType.F16,
    "bf16": DType.BF16,
    "q8_0": DType.Q8_0,
}
# Suffixes that several formats have.
_SHARED_SUFFIXES = {".safetensors", ".npz", ".bin"}
# What looks like the suffix of a file: `.ggf`, and not the `.5` or `.1-lora` of a model's name.
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,11}")


@dataclass(frozen=True, kw_only=True, repr=False)
class ProvenFile(Shown):
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

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what was written, and the proof."""
        del pen
        error = short(self.max_relative_error)
        if self.max_relative_error and self.worst_module:
            error += f" ({printable(self.worst_module)})"
        return f"{self._written()}\nproof: ΔW equal {self._where()}, largest relative error {error}"

    def _written(self) -> str:
        modules, parameters = count(self.modules, "module"), count(self.parameters, "parameter")
        return line(self.destination, self.format, modules, parameters, size(self.bytes))

    def _where(self) -> str:
        return f"in all {self.modules:,} modules" if self.modules != 1 else "in the one module"


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """What may be written of an adapter.

    Attributes:
        adapter: what is left of it.
        losses: what is dropped.
        warnings: what to mention, one sentence each.
    """

    adapter: AdapterTensorSet
    losses: tuple[Loss, ...] = ()
    warnings: tuple[str, ...] = ()


def destination_format(path: Path, name: str | None, *, force: bool) -> FormatSpec:
    """Return the format to write: by name if given, else by the destination's suffix.

    What stands in the way of writing there is said now, before long work is done for nothing.

    Raises:
        UsageError: if the suffix means no format and no name was given, if the two contradict each
            other, or the format is read-only.
        DestinationExistsError: if there is something at the destination that is not to be replaced.
    """
    chosen = _meant(path) if name is None else spec(name)
    if not chosen.writes:
        raise UsageError(f"format {chosen.name!r} can be read but not written")
    if path.suffix.lower() not in chosen.suffixes and (other := by_suffix(path.suffix)):
        raise UsageError(
            f"{path.suffix} is for {other.name}, and {chosen.name} is "
            f"{'a directory' if chosen.files else 'another file'}; name another destination"
        )
    if chosen.files and path.suffix in _SHARED_SUFFIXES and not os.path.isdir(path):  # noqa: PTH112  (never raises)
        raise UsageError(f"{chosen.name} is a directory, not a {path.suffix} file; name another")
    check_destination(path, force=force, directory=directory_of(chosen))
    return chosen


def _meant(path: Path) -> FormatSpec:
    """Return the format that a destination means by its name: a directory is peft.

    What looks like the suffix of a file is no directory's name; `qwen2.5` has none.
    """
    if chosen := by_suffix(path.suffix):
        return chosen
    if os.path.isdir(path):  # noqa: PTH112  (what cannot be looked at is refused by its check)
        return BUILTIN[0]
    if path.suffix in _SHARED_SUFFIXES:
        raise UsageError(f"a {path.suffix} file can hold several formats; choose one with --to")
    if _SUFFIX.fullmatch(path.suffix):
        suffixes = [suffix for known in formats() for suffix in known.suffixes]
        from difflib import get_close_matches

        close = get_close_matches(path.suffix, [*suffixes, *_SHARED_SUFFIXES], n=1)
        told = f"did you mean {path.with_suffix(close[0])}? " if close else ""
        raise UsageError(
            f"{path.name}: no format has the suffix {path.suffix}; {told}--to FORMAT says what to "
            "write, and --to peft makes a directory of this name"
        )
    return BUILTIN[0]


def stored_type(outtype: DType | str | None) -> DType | None:
    """Return the stored type that a word means; None keeps each factor's.

    Raises:
        UsageError: if there is no such outtype; the message lists all.
    """
    if outtype is None or isinstance(outtype, DType):
        return outtype
    if outtype not in OUTTYPES:
        raise unknown("outtype", outtype, OUTTYPES)
    return OUTTYPES[outtype]


def admitted(
    adapter: AdapterTensorSet,
    target: FormatSpec,
    options: FormatOptions,
    *,
    into: Path | None,
    allow_lossy: bool = False,
    passed: Sequence[Loss] = (),
) -> Admitted:
    """Return what may be written of an adapter, what is dropped for that, and what to mention.

    Args:
        adapter: sound.
        target: the format to write.
        options: base, dtype and layout to write with.
        into: where it is to be written; what lies there and stays is mentioned. None for a place
            of its own.
        allow_lossy: whether to leave out what the target cannot hold.
        passed: what the passes on the way in dropped, or would have to.

    Raises:
        FormatError: if the adapter is broken.
        IncompatibleBaseError: if it does not fit the base.
        LossyConversionError: if something would be lost and may not be, or if nothing would be
            left; lists every reason.
        UnsupportedError: if nothing was trained, or experts are spelled in two ways.
    """
    path = adapter.provenance.path if adapter.provenance else None
    grown: set[str] = set()
    if target.any_vocabulary:
        grown = {loss.subject for loss in passed if loss.code == "vocabulary"}
        passed = [loss for loss in passed if loss.code not in {"vocabulary", OTHER_TABLE}]
    if not _trained(adapter):
        what = "holds nothing that was trained; save the adapter again after training"
        raise UnsupportedError(what, path=path)
    if passed and not allow_lossy:
        raise LossyConversionError(passed, path=path)
    _check_experts(adapter, path)
    if options.base:
        from adapterkit.base.fit import check_fit

        check_fit(_beside(adapter, grown), options.base)
    found = target.losses(adapter, options)
    losses = tuple(loss for loss in found if loss.blocks)
    if losses and not (allow_lossy and all(loss.droppable for loss in losses)):
        raise LossyConversionError(losses, path=path)
    left = by_name("drop").change(adapter, Context(losses=losses)).adapter
    if not _trained(left):
        message = "an adapter without it would hold nothing that was trained"
        raise LossyConversionError(
            [*losses, Loss("nothing-left", target.title, message)], path=path
        )
    warnings = [f"{loss.subject}: {loss.message}" for loss in found if not loss.blocks]
    return Admitted(
        adapter=left,
        losses=(*passed, *losses),
        warnings=(
            *(*warnings, *_carried(left, found), *_silence(left)),
            *_left_lying(left, into, target),
        ),
    )


def save(
    adapter: AdapterTensorSet,
    destination: Path,
    target: FormatSpec,
    options: FormatOptions,
    *,
    force: bool = False,
    against: AdapterTensorSet | None = None,
    spared: Iterable[Path] = (),
    accept: Callable[[AdapterTensorSet], None] | None = None,
    making: Making | None,
) -> ProvenFile:
    """Write an adapter, read the file back, compare every update, and only then keep it.

    Args:
        adapter: what to write.
        destination: file or directory to create.
        target: the format.
        options: base, dtype and layout to write with.
        force: replace an existing destination.
        against: what the file must be equal to, where `adapter` is a changed form of it.
        spared: further files that the output is made from and must not replace.
        accept: raises if what was read back is not what was wanted.
        making: what the file carries beside what it holds, for `verify`; None for no proof.

    Raises:
        FormatError: if a factor of the adapter is not finite.
        ProofError: if the file does not hold the same updates; it is removed.
        DestinationExistsError: if the destination exists and `force` is false.
        WriteError: if the output cannot be written.
    """
    # What was told of the source is no news about the file: it must say everything itself.
    reading = replace(options, like=adapter.modules, alpha=None, dialect=None)
    kept = {*spared, *_read_from(against or adapter, options)}
    with staged(destination, force=force, directory=directory_of(target), spared=kept) as staging:
        target.write(adapter, staging, options)
        written = target.read(staging, reading)
        worst, error = prove(against or adapter, written, path=destination)
        if accept is not None:
            accept(written)
        if making is not None:
            sources = _sources(against or adapter, [*spared, *making.sources])
            made = replace(making, sources=tuple(sources))
            carry(staging, certified(written, options, error=error, making=made))
        return ProvenFile(
            destination=str(destination),
            format=target.name,
            modules=len(written.modules),
            parameters=written.parameters,
            bytes=_size(staging),
            max_relative_error=error,
            worst_module=worst,
        )


def _sources(adapter: AdapterTensorSet, spared: Iterable[Path]) -> list[Path]:
    own = [adapter.provenance.path] if adapter.provenance else []
    return list(dict.fromkeys([*own, *spared]))


def _beside(adapter: AdapterTensorSet, modules: set[str]) -> AdapterTensorSet:
    """Return an adapter without some modules."""
    kept = {key: tensor for key, tensor in adapter.tensors.items() if key.module not in modules}
    return adapter.replace(tensors=kept) if modules else adapter


def _check_experts(adapter: AdapterTensorSet, path: Path | None) -> None:
    """Refuse experts that are stacked and one by one: who loads one spelling leaves the other."""
    modules = [update.module for update in adapter.pairs()]
    alone = next((module for module in modules if is_one_expert(module)), None)
    stacks = (m for m in modules if adapter.kinds.get(m) is Kind.EXPERTS and ".experts" in m)
    stacked = next(stacks, None)
    if alone and stacked:
        raise UnsupportedError(
            f"is an expert, and those of {stacked} are stacked: no model has both; merge the "
            f"adapters into the base instead ({MERGE})",
            path=path,
            where=alone,
        )


def _carried(adapter: AdapterTensorSet, losses: Sequence[Loss]) -> list[str]:
    """Say which files come along: those that the target does not name as a loss."""
    lost = {loss.subject for loss in losses}
    files = [file for file in adapter.beside if file.name not in lost and file.trained]
    return [f"{file.name}: {file.what}, is copied as it is" for file in files]


def _left_lying(
    adapter: AdapterTensorSet, destination: Path | None, target: FormatSpec
) -> Iterator[str]:
    """Say of weights in a directory that is replaced that they stay, and will look like its own."""
    directory = directory_of(target)
    if destination is None or directory is None or not destination.is_dir():
        return
    new = {file.name for file in adapter.beside if file.carried}
    staying = [
        file.name
        for file in lying_beside(destination, directory.files(), None)
        if (file.trained or file.kind is BesideKind.UNKNOWN) and file.name not in new
    ]
    if staying:
        yield (
            f"{first_and_more(staying, MOST_NAMED)}: weights that lie in {destination} already and "
            "stay there; remove what was the former adapter's, it looks like this one's"
        )


def _trained(adapter: AdapterTensorSet) -> bool:
    return any(key.role is not Role.BASE_COPY for key in adapter.tensors)


def _silence(adapter: AdapterTensorSet) -> tuple[str, ...]:
    """Say that an adapter changes nothing, where that is so."""
    return (IDLE,) if idle(adapter) else ()


def _read_from(adapter: AdapterTensorSet, options: FormatOptions) -> set[Path]:
    """Return the files that an output is made from."""
    found = {t.read.path for t in adapter.tensors.values() if isinstance(t.read, FileSlice)}
    if adapter.provenance:
        found.add(adapter.provenance.path)
    return found | ({options.base.path} if options.base else set())


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
