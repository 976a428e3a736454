"""Merge adapter files into an adapter file, and prove on the written one that it is the merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.base import open_base
from adapterkit.base.initialisation import without_base_change
from adapterkit.base.vocabulary import matched
from adapterkit.convert import ProvenFile, admitted, load, stored_type, write_proven
from adapterkit.errors import UsageError
from adapterkit.formats.protocol import Options
from adapterkit.hub import located
from adapterkit.merge.adapters import merge
from adapterkit.merge.report import MergeReport
from adapterkit.model.defects import check_structure
from adapterkit.notes import Loss
from adapterkit.registry import destination_format, own_format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.dtype import DType
    from adapterkit.model import AdapterTensorSet


@dataclass(frozen=True, kw_only=True)
class MergeFilesReport(ProvenFile):
    """What a merge of files did and how it was proven.

    What the merge itself costs is in `merge`; the error of the file is against the merged adapter.

    Attributes:
        sources: paths that were read.
        merge: the merge, module by module.
        losses: what was dropped, with `allow_lossy`.
        notes: what was normalised on the way.
    """

    sources: tuple[str, ...]
    merge: MergeReport
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()


def merge_files(
    sources: Sequence[Path | str],
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
    **settings: Any,
) -> MergeFilesReport:
    """Merge adapters of any formats into one of any format, with the proof that `convert` gives.

    Args:
        sources: adapters, any formats.
        destination: file or directory to create.
        to: name of the format; by default a `.gguf` file is gguf and a directory is peft.
        base: the base model, where names, row orders or initial factors depend on it.
        outtype: `auto` stores each module as the widest of its sources; `f32`, `f16`, `bf16`,
            `q8_0`.
        moe_layout: `experts` or `fused`, where the target has two spellings.
        dialect: key grammar of hand-written adapters, where the files cannot tell.
        alpha: scale numerator of adapters whose files do not hold it.
        unverified: allow families without a passing engine test.
        allow_lossy: write the rest where the target cannot hold parts; the report lists them.
        force: replace an existing destination.
        settings: further arguments of `merge`.

    Raises:
        AdapterKitError: as `merge` and `convert` do; nothing is written then.
    """
    if not sources:
        raise UsageError("nothing to merge; name one adapter or more")
    destination = Path(destination)
    target = destination_format(destination, to)
    dtype = stored_type(outtype)
    options = Options(
        base=open_base(base) if base is not None else None,
        dtype=dtype,
        moe_layout=moe_layout,
        unverified=unverified,
        dialect=dialect,
        alpha=alpha,
    )
    adapters, options, notes = _read([located(source) for source in sources], options)
    result = merge(adapters, dtype=_rounded_in_merge(dtype), **settings)
    adapter, losses, warnings = admitted(result.adapter, target, options, allow_lossy=allow_lossy)
    proven = write_proven(adapter, destination, target, options, force=force)
    return MergeFilesReport(
        **vars(proven),
        sources=tuple(str(source) for source in sources),
        merge=result.report,
        losses=losses,
        notes=(*notes, *warnings),
    )


def _read(
    paths: Sequence[Path], options: Options
) -> tuple[list[AdapterTensorSet], Options, list[str]]:
    """Read all adapters, with the base that one of them names and that is cached."""
    given = options.base
    weights = given is not None and given.kind == "hf" and given.has_tensors
    specs = [own_format(path, options.dialect) for path in paths]
    for path, spec in zip(paths, specs, strict=True):
        if options.base is None:
            _, found = load(path, spec, options)
            options = replace(options, base=found.base)
    adapters: list[AdapterTensorSet] = []
    notes: list[str] = []
    for path, spec in zip(paths, specs, strict=True):
        adapter = spec.format.read(path, options)
        check_structure(adapter)
        if weights:
            adapter = without_base_change(adapter, options.base)
        said = adapter.provenance.notes if adapter.provenance else ()
        notes += [f"{path}: {note}" for note in said]
        if options.base is not None:
            adapter, changes = matched(adapter, options.base)
            notes += [f"{path}: {change}" for change in changes]
        adapters.append(adapter)
    return adapters, options, notes


def _rounded_in_merge(dtype: DType | None) -> DType | None:
    """Return the type that the merge rounds to; blocks are made by the writer, from float32."""
    from adapterkit.dtype import DType

    return DType.F32 if dtype is not None and dtype.quantised else dtype
