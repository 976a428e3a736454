"""The one way in: an adapter found, read, checked and made plain, with its base opened once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, overload

from adapterkit.base import BaseModel, open_base
from adapterkit.base.recorded import other_architecture, recorded_base
from adapterkit.errors import (
    IncompatibleBaseError,
    UnknownFormatError,
    UnsupportedError,
    UsageError,
)
from adapterkit.formats.protocol import FormatOptions
from adapterkit.formats.spec import FormatSpec
from adapterkit.given_alpha import check_no_other, check_number, filled
from adapterkit.hub import located
from adapterkit.model import AdapterTensorSet
from adapterkit.model.defects import check_structure
from adapterkit.notes import Loss, Note
from adapterkit.registry import detect, spec
from adapterkit.storage import readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.passes.protocol import Passed


class Need(IntEnum):
    """How much must hold of an adapter that is loaded; each level includes those before it.

    STORED: it is what the file holds, broken or not. SOUND: factors pair up and agree, and what
    the config denies is not there. FITTED: it went through the passes as far as the base at hand
    allows; what they cannot undo, and what the config denies, is still there, for a target that
    holds it or refuses. PLAIN: its tensors are the update of the original base.
    """

    STORED = 0
    SOUND = 1
    FITTED = 2
    PLAIN = 3


@dataclass(frozen=True, slots=True)
class Source:
    """A path that is an adapter.

    Attributes:
        path: file or directory on this machine.
        format: what it is, told by content or by the user.
    """

    path: Path
    format: FormatSpec


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An adapter as a command gets it.

    Attributes:
        source: where it was read from; None for an adapter in memory.
        adapter: as far as it was asked for.
        options: what it was read with; its base is the one given, or the one that the adapter (or
            another beside it) names and the local hub cache holds.
        given: whether the user gave the base.
        notes: what was normalised on the way, in order.
        losses: what a pass dropped, or had to leave because dropping it was not allowed.
        misfit: why the base could not be used in reading; only where STORED was asked for.
    """

    source: Source | None
    adapter: AdapterTensorSet
    options: FormatOptions
    given: bool
    notes: tuple[Note, ...] = ()
    losses: tuple[Loss, ...] = ()
    misfit: IncompatibleBaseError | None = None

    @property
    def base(self) -> BaseModel | None:
        """The base model, if one is known."""
        return self.options.base

    @property
    def label(self) -> str:
        """The path, as messages and reports name it."""
        return str(self.source.path) if self.source else "in memory"

    @property
    def format(self) -> str:
        """Name of the format that was read; empty for an adapter in memory."""
        return self.source.format.name if self.source else ""

    @property
    def told(self) -> tuple[str, ...]:
        """The notes as sentences."""
        return tuple(map(str, self.notes))


def load(
    source: Source | AdapterTensorSet | Path | str,
    *,
    base: BaseModel | Path | str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    moe_layout: str | None = None,
    as_format: str | None = None,
    need: Need = Need.PLAIN,
    allow_lossy: bool = False,
    any_vocabulary: bool = False,
) -> Loaded:
    """Load an adapter of any format, or take one in memory through the same checks and passes.

    Args:
        source: file, directory or hub id; one that was recognised already; or an adapter.
        base: its base model, opened or where it is; by default the one that the adapter names, if
            it is in the local hub cache.
        dialect: key grammar of a hand-written adapter, where the file cannot tell.
        alpha: scale numerator, where the file does not hold it; it overrides nothing.
        moe_layout: `experts` or `fused`, the spelling of experts, where the file has none.
        as_format: name of the format to read it as, where its content does not tell.
        need: how much must hold of it.
        allow_lossy: whether a pass may drop what it cannot keep; it is listed.
        any_vocabulary: whether rows of a vocabulary that the base lacks, and frozen copies of
            tables that are not the base's, stay all the same.

    Raises:
        FormatError: if there is no adapter, or it is malformed or, where more than STORED is
            needed, broken.
        UnsupportedError: if it cannot be read without another base, or what is needed cannot hold.
        UsageError: if the file cannot say something, says another alpha, or a format is unknown.
    """
    (loaded,) = load_all(
        [source],
        base=base,
        dialect=dialect,
        alpha=alpha,
        moe_layout=moe_layout,
        as_format=as_format,
        need=need,
        allow_lossy=allow_lossy,
        any_vocabulary=any_vocabulary,
    )
    return loaded


def load_all(
    sources: Sequence[Source | AdapterTensorSet | Path | str],
    *,
    base: BaseModel | Path | str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    moe_layout: str | None = None,
    as_format: str | None = None,
    need: Need = Need.PLAIN,
    allow_lossy: bool = False,
    growing: bool = False,
    any_vocabulary: bool = False,
) -> tuple[Loaded, ...]:
    """Load adapters of one base: the one that is given, or that one of them names.

    Where `growing` is true, the base may grow by rows of a vocabulary that an adapter carries.

    Args and errors are those of `load`. A dialect is for those whose file cannot tell; of several,
    it overrules no config beside another. Alpha goes to those that leave it open.
    """
    check_number(alpha)
    alone = len(sources) == 1
    found = [_found(each, dialect, as_format, alone=alone) for each in sources]
    options = FormatOptions(
        base=open_model(base), dialect=dialect, alpha=alpha, moe_layout=moe_layout
    )
    read = _readings if options.base is not None else _readings_with_recorded_base
    readings = read(found, options, need)
    if not any(each.options.alpha is not None for each in readings):
        check_no_other(alpha, ((each.label, each.adapter) for each in readings))
    if base is not None:
        readings = [
            replace(each, notes=(*each.notes, *other_architecture(each.adapter, each.base)))
            for each in readings
        ]
    known = readings[-1].base if readings else options.base
    prepared = [
        _prepared(
            replace(each, options=replace(each.options, base=known), given=base is not None),
            need,
            base=known,
            allow_lossy=allow_lossy,
            growing=growing,
            any_vocabulary=any_vocabulary,
        )
        for each in readings
    ]
    return tuple(prepared) if need < Need.SOUND else _named_alike(prepared, known)


def recognise(
    source: Path | str,
    *,
    dialect: str | None = None,
    as_format: str | None = None,
    alone: bool = True,
) -> Source:
    """Find an adapter and tell its format, by content unless the user says it.

    Args:
        source: file, directory or hub id.
        dialect: means the hand-written format where nothing else knows the file, and where it is
            said of this file alone also against a config that lies beside it; only formats that
            take one themselves keep it.
        as_format: name of a format that reads.
        alone: whether the dialect is said of this file alone.

    Raises:
        NotFoundError: if there is nothing at the path.
        UnknownFormatError: if no format recognises it.
        UsageError: if the named format is unknown.
    """
    path = located(source)
    if as_format is not None:
        named = spec(as_format)
        if not named.reads:
            raise UsageError(f"format {named.name!r} can be written but not read")
        return Source(path, named)
    try:
        found = detect(path)
    except UnknownFormatError:
        if dialect is None:
            raise
        return Source(path, spec("handwritten"))
    overruled = dialect is not None and alone and not found.takes_dialect
    return Source(path, spec("handwritten") if overruled else found)


@overload
def open_model(base: None) -> None: ...
@overload
def open_model(base: BaseModel | Path | str) -> BaseModel: ...
@overload
def open_model(base: BaseModel | Path | str | None) -> BaseModel | None: ...
def open_model(base: BaseModel | Path | str | None) -> BaseModel | None:
    """Return a base that is opened: itself, or what lies at a path or hub id; None for None.

    Raises:
        NotFoundError: if there is no model.
        FormatError: if a file of it is malformed.
        UnknownArchitectureError: if no family file describes a GGUF file's model.
    """
    return base if base is None or isinstance(base, BaseModel) else open_base(base)


def _found(
    source: Source | AdapterTensorSet | Path | str,
    dialect: str | None,
    as_format: str | None,
    *,
    alone: bool,
) -> Source | AdapterTensorSet:
    if isinstance(source, (Source, AdapterTensorSet)):
        return source
    return recognise(source, dialect=dialect, as_format=as_format, alone=alone)


def _readings(
    found: Sequence[Source | AdapterTensorSet], options: FormatOptions, need: Need
) -> list[Loaded]:
    """Read all; the family of a base that may be several is what the adapters before made of it."""
    readings: list[Loaded] = []
    for source in found:
        reading = _read(source, options, need)
        options = replace(options, base=reading.base)
        readings.append(reading)
    return readings


def _readings_with_recorded_base(
    found: Sequence[Source | AdapterTensorSet], options: FormatOptions, need: Need
) -> list[Loaded]:
    """Read all with the first base that one of them names and that is at hand; else without."""
    readings: list[Loaded] = []
    for source in found:
        reading = _read(source, options, need)
        model, note = recorded_base(reading.adapter)
        if model is not None:
            done = _readings(found, replace(options, base=model), need)
            return [replace(each, notes=(*each.notes, *note)) for each in done]
        readings.append(replace(reading, notes=(*reading.notes, *note)))
    return readings


def _read(source: Source | AdapterTensorSet, options: FormatOptions, need: Need) -> Loaded:
    misfit = None
    if isinstance(source, AdapterTensorSet):
        adapter, place, options = source, None, replace(options, alpha=None)
    else:
        place = source
        try:
            with readable(source.path):
                adapter, options = filled(source.format, source.path, options)
        except IncompatibleBaseError as error:
            if need > Need.STORED or options.base is None:
                raise
            # What the file holds can be looked at all the same, where that takes no base.
            try:
                adapter, taken = filled(source.format, source.path, replace(options, base=None))
                options = replace(options, alpha=taken.alpha)
            except UnsupportedError:
                raise error from None
            misfit = error
    if options.base is not None:
        options = replace(options, base=options.base.suited(adapter.modules))
    said = adapter.provenance.notes if adapter.provenance else ()
    return Loaded(
        source=place,
        adapter=adapter,
        options=options,
        given=False,
        notes=tuple(each if isinstance(each, Note) else Note(each) for each in said),
        misfit=misfit,
    )


def _prepared(
    loaded: Loaded,
    need: Need,
    *,
    base: BaseModel | None,
    allow_lossy: bool,
    growing: bool,
    any_vocabulary: bool,
) -> Loaded:
    """Check and change a reading as far as it is needed."""
    if need < Need.SOUND:
        return loaded
    from adapterkit.passes.protocol import Context
    from adapterkit.passes.registry import apply

    context = Context(base=base, allow_lossy=allow_lossy, growing=growing)

    check_structure(loaded.adapter)
    if need is not Need.FITTED:  # targets name what the config denies among all else that they do
        settled = apply(["declaration"], loaded.adapter, context)
        loaded = replace(
            loaded,
            adapter=_annotated(settled),
            notes=(*loaded.notes, *settled.notes),
            losses=settled.losses,
        )
    if need < Need.FITTED:
        return loaded
    context = replace(context, allow_lossy=context.allow_lossy and not any_vocabulary)
    names = ("pooling", "initialisation", "copies", "vocabulary")
    try:
        done = apply(names, loaded.adapter, context)
    except UnsupportedError:
        # A base that nobody gave, or gave without weights, decides nothing where that is no need.
        if need >= Need.PLAIN or (loaded.given and _has_weights(loaded.base)):
            raise
        done = apply(names[2:], loaded.adapter, context)
    return replace(
        loaded,
        adapter=_annotated(done),
        notes=(*loaded.notes, *done.notes),
        losses=(*loaded.losses, *done.losses),
    )


def _named_alike(prepared: Sequence[Loaded], base: BaseModel | None) -> tuple[Loaded, ...]:
    """Give the modules that several adapters name differently the names that the base has."""
    if len(prepared) == 1:
        return tuple(prepared)
    from adapterkit.passes.naming import named_alike

    named = named_alike([each.adapter for each in prepared], base)
    return tuple(
        replace(each, adapter=_annotated(done), notes=(*each.notes, *done.notes))
        for each, done in zip(prepared, named, strict=True)
    )


def _has_weights(base: BaseModel | None) -> bool:
    return base is not None and base.kind == "hf" and base.has_tensors


def _annotated(done: Passed) -> AdapterTensorSet:
    """Return the adapter with the passes' notes among its own, which travel with it."""
    source = done.adapter.provenance
    if source is None or not done.notes:
        return done.adapter
    notes = (*source.notes, *map(str, done.notes))
    return done.adapter.replace(provenance=replace(source, notes=notes))
