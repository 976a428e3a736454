"""Convert an adapter: read, list what would be lost, write, prove, and only then keep the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.attempts import Attempt, for_each
from adapterkit.base import BaseModel
from adapterkit.certificates import Making
from adapterkit.errors import LossyConversionError, UsageError
from adapterkit.formats.builtin import BUILTIN
from adapterkit.formats.spec import FormatSpec
from adapterkit.loading import Need, load
from adapterkit.model import AdapterTensorSet
from adapterkit.notes import Loss
from adapterkit.passes.protocol import Context, Passed
from adapterkit.passes.registry import NAMING, apply, by_name
from adapterkit.registry import by_suffix, spec
from adapterkit.saving import ProvenFile, admitted, destination_format, save, stored_type
from adapterkit.several import each_of, named
from adapterkit.work import watchable

if TYPE_CHECKING:
    from adapterkit.engines.engine import Target


@dataclass(frozen=True, kw_only=True, repr=False)
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


@watchable
def convert(
    source: AdapterTensorSet | Path | str,
    destination: Path | str,
    *,
    to: str | None = None,
    for_engine: str | None = None,
    base: BaseModel | Path | str | None = None,
    outtype: str = "auto",
    dora_rank: int | None = None,
    moe_layout: str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    unverified: bool = False,
    allow_lossy: bool = False,
    force: bool = False,
    proof: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Convert an adapter to another format, and prove on the written file that nothing changed.

    Args:
        source: adapter of any format that is read, or one in memory.
        destination: file or directory to create.
        to: name of the format; by default a `.gguf` file is gguf and a directory is peft.
        for_engine: an engine, `name` or `name@version`, whose format is written, with the exact
            changes that it needs; its rules are held against what was written.
        base: Hugging Face directory, config.json, GGUF file or cached hub id of the base model; by
            default the one that the adapter names, if it is in the local hub cache.
        outtype: `auto` keeps every factor's dtype; `f32`, `f16`, `bf16`, `q8_0`.
        dora_rank: rank of the nearest LoRA that every DoRA becomes, with `allow_lossy` and the
            base's weights; the losses hold the relative error of each.
        moe_layout: `experts` or `fused`, where the target has two spellings.
        dialect: key grammar of a hand-written adapter, where the file cannot tell.
        alpha: scale numerator, where the file does not hold it.
        as_format: name of the format to read the source as, where its content does not tell.
        unverified: allow families without a passing engine test.
        allow_lossy: write the rest where the target cannot hold parts; the report lists them.
        force: replace an existing destination.
        proof: whether the file carries what it was made from and what it holds, for `verify`.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        FormatError: if the source is malformed or broken.
        LossyConversionError: if the target cannot hold something; lists every reason.
        UnsupportedError: if the engine would not run the result; if the base is unknown,
            missing or another model, or the proof fails.
        DestinationExistsError: if the destination exists and `force` is false.
        WriteError: if the output cannot be written.
    """
    del progress  # told by `watchable`
    destination = Path(destination)
    engine = _engine(for_engine) if for_engine else None
    target = destination_format(destination, to or (engine and engine.format), force=force)
    dtype = stored_type(outtype)
    loaded = load(
        source,
        base=base,
        dialect=dialect,
        alpha=alpha,
        moe_layout=moe_layout,
        as_format=as_format,
        need=Need.FITTED,
        allow_lossy=allow_lossy,
        any_vocabulary=target.any_vocabulary,
    )
    options = replace(loaded.options, dtype=dtype, unverified=unverified)
    context = Context(base=loaded.base, dora_rank=dora_rank)
    plain = apply(["dora"], loaded.adapter, context)
    # The proof compares modules by name, so it is of the adapter under its new names.
    prepare = engine.changes if engine else ()
    named = apply([step for step in prepare if step in NAMING], plain.adapter, context)
    served = _served(named.adapter, loaded.base, engine)
    ready = admitted(
        served.adapter,
        target,
        options,
        into=destination,
        allow_lossy=allow_lossy,
        passed=(*loaded.losses, *plain.losses, *served.losses),
    )
    changed = apply([step for step in prepare if step not in NAMING], ready.adapter, context)
    unheld: list[Loss] = []

    def accept(written: AdapterTensorSet) -> None:
        if engine:
            from adapterkit.engines.judgement import check_served

            told = check_served(written, loaded.base, engine, path=destination)
            unheld.extend(Loss("passed-over", engine.title, each) for each in told)
            if unheld and not allow_lossy:
                raise LossyConversionError(unheld, path=destination)

    proven = save(
        changed.adapter,
        destination,
        target,
        options,
        force=force,
        against=ready.adapter,
        accept=accept,
        making=Making("convert", {"for": for_engine, "dora_rank": dora_rank}) if proof else None,
    )
    return ConversionReport(
        **vars(proven),
        source=loaded.label,
        source_format=loaded.format,
        losses=(*ready.losses, *unheld),
        notes=(
            *loaded.told,
            *map(str, (*plain.notes, *named.notes, *changed.notes)),
            *ready.warnings,
        ),
    )


def convert_all(
    sources: Sequence[AdapterTensorSet | Path | str],
    destination: Path | str,
    *,
    to: str | None = None,
    for_engine: str | None = None,
    base: BaseModel | Path | str | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> tuple[Attempt[ConversionReport], ...]:
    """Convert several adapters into one folder; one that fails ends nothing.

    Args:
        sources: adapters of any formats that are read, or in memory.
        destination: folder where each output goes, under its source's name with the suffix.
        to: name of the format; peft by default.
        for_engine: an engine whose format is written, as for `convert`.
        base: base model of all of them, opened once; None for what each names.
        jobs: how many at a time; by default one for each processor, up to four.
        progress: told how many of how many are done.
        settings: what `convert` takes besides.

    Raises:
        UsageError: if two outputs would have one name, or the folder that of a file, before
            anything is written.
    """
    folder = Path(destination)
    if (one_file := by_suffix(folder.suffix)) and not folder.is_dir():
        message = f"is the name of one {one_file.name} file, and several adapters go to a folder"
        raise UsageError(f"{message}; name one, with --to {one_file.name}", path=destination)
    name = to or (_engine(for_engine).format if for_engine else None) or BUILTIN[0].name
    every = each_of(sources)
    places = _places(every, folder, spec(name))

    def one(source: AdapterTensorSet | Path | str, **given: Any) -> ConversionReport:
        return convert(source, places[named(source)], to=name, for_engine=for_engine, **given)

    return for_each(one, every, base=base, jobs=jobs, progress=progress, **settings)


def _places(
    sources: Sequence[AdapterTensorSet | Path | str], folder: Path, target: FormatSpec
) -> dict[str, Path]:
    """Return where each output goes: below the folder, as its source's directory or stem."""
    suffix = "" if target.files else next(iter(target.suffixes), ".safetensors")
    places: dict[str, Path] = {}
    for source in map(named, sources):
        path = Path(source)
        # As it was named: a link is not called what it leads to.
        name = path.stem if path.is_file() else Path(os.path.abspath(path)).name  # noqa: PTH100
        if folder / (name + suffix) in places.values():
            raise UsageError(
                f"two outputs would be called {name + suffix}; convert one of them alone",
                path=source,
            )
        places[source] = folder / (name + suffix)
    return places


def _served(adapter: AdapterTensorSet, base: BaseModel | None, engine: Target | None) -> Passed:
    """Return an adapter without what an engine that applies part of it passes over."""
    if engine is None:
        return Passed(adapter)
    from adapterkit.engines.judgement import passed_over

    losses = tuple(passed_over(adapter, base, engine))
    return by_name("drop").change(adapter, Context(losses=losses))


def _engine(reference: str) -> Target:
    from adapterkit.engines.engine import load_target

    return load_target(reference)
