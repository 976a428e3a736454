"""Merge adapter files into an adapter file, and prove on the written one that it is the merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterkit.base import BaseModel
from adapterkit.beside import shared_tokenizer
from adapterkit.certificates import Making
from adapterkit.dtype import DType
from adapterkit.errors import UsageError
from adapterkit.loading import Loaded, load_all
from adapterkit.merging.adapters import merge
from adapterkit.merging.report import MergeReport
from adapterkit.model import AdapterTensorSet, BesideFile, BesideKind
from adapterkit.model.beside import left_behind, lost_trained
from adapterkit.notes import Loss
from adapterkit.saving import ProvenFile, admitted, destination_format, save, stored_type
from adapterkit.several import each_of
from adapterkit.text import PLAIN, Pen, short
from adapterkit.work import watchable

_EMPTY = "holds nothing that was trained, and adds nothing"


@dataclass(frozen=True, kw_only=True, repr=False)
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

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what was written, what the merge cost, and the proof."""
        error = short(self.max_relative_error)
        proof = f"proof: ΔW of the file is the merged one {self._where()}, largest relative error "
        return f"{self._written()}\n{self.merge.text(pen)}\n{proof}{error}"

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each merged module."""
        return self.merge.rows()

    def remarks(self) -> list[tuple[str, str]]:
        """Return what the merge says, and then what the file does."""
        return [*self.merge.remarks(), *super().remarks()]


@watchable
def merge_files(
    sources: Sequence[AdapterTensorSet | Path | str],
    destination: Path | str,
    *,
    to: str | None = None,
    base: BaseModel | Path | str | None = None,
    outtype: str = "auto",
    moe_layout: str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    unverified: bool = False,
    allow_lossy: bool = False,
    force: bool = False,
    proof: bool = True,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> MergeFilesReport:
    """Merge adapters of any formats into one of any format, with the proof that `convert` gives.

    Args:
        sources: adapters of any formats, or in memory.
        destination: file or directory to create.
        to: name of the format; by default a `.gguf` file is gguf and a directory is peft.
        base: the base model, where names, row orders or initial factors depend on it.
        outtype: `auto` stores each module as the widest of its sources; `f32`, `f16`, `bf16`,
            `q8_0`.
        moe_layout: `experts` or `fused`, where the target has two spellings.
        dialect: key grammar of hand-written adapters, where the files cannot tell.
        alpha: scale numerator of adapters whose files do not hold it.
        as_format: name of the format to read all as, where their content does not tell.
        unverified: allow families without a passing engine test.
        allow_lossy: write the rest where the target cannot hold parts; the report lists them.
        force: replace an existing destination.
        proof: whether the file carries what it was made from and what it holds, for `verify`.
        settings: further arguments of `merge`.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        AdapterKitError: as `merge` and `convert` do; nothing is written then.
    """
    del progress  # told by `watchable`
    sources = each_of(sources)
    if not sources:
        raise UsageError("nothing to merge; name one adapter or more")
    destination = Path(destination)
    target = destination_format(destination, to, force=force)
    dtype = stored_type(outtype)
    loaded = load_all(
        sources,
        base=base,
        dialect=dialect,
        alpha=alpha,
        moe_layout=moe_layout,
        as_format=as_format,
        allow_lossy=allow_lossy,
        any_vocabulary=target.any_vocabulary,
    )
    options = replace(loaded[0].options, dtype=dtype, unverified=unverified)
    result = merge([each.adapter for each in loaded], dtype=_rounded_in_merge(dtype), **settings)
    tokenizer, split = shared_tokenizer([each.adapter.beside for each in loaded])
    ready = admitted(
        result.adapter.replace(beside=tokenizer),
        target,
        options,
        into=destination,
        allow_lossy=allow_lossy,
        passed=[
            loss for each in loaded for loss in (*each.losses, *lost_trained(each.adapter.beside))
        ],
    )
    read = [each.source.path for each in loaded if each.source]
    proven = save(
        ready.adapter,
        destination,
        target,
        options,
        force=force,
        spared=read,
        making=Making("merge", _said(settings)) if proof else None,
    )
    return MergeFilesReport(
        **vars(proven),
        sources=tuple(each.label for each in loaded),
        merge=result.report,
        losses=ready.losses,
        notes=(
            *(f"{each.label}: {note}" for each in loaded for note in each.notes),
            *(f"{each.label}: {_EMPTY}" for each in loaded if not each.adapter.tensors),
            *(f"{each.label}: {told}" for each in loaded for told in _left(each, tokenizer)),
            *([f"{', '.join(split)} beside the adapters differ and are left out"] if split else []),
            *ready.warnings,
        ),
    )


def _left(loaded: Loaded, tokenizer: Sequence[BesideFile]) -> list[str]:
    """Say which files of a source are not in the output, the shared tokenizer aside."""
    shared = {file.name for file in tokenizer}
    return left_behind(
        file
        for file in loaded.adapter.beside
        if not (file.kind is BesideKind.TOKENIZER and file.name in shared)
    )


def _said(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the result depends on, the same however it was said."""
    numbers = dict(settings.get("params") or {})
    if settings.get("density") is not None:
        numbers["density"] = settings["density"]
    kept = {k: v for k, v in settings.items() if k not in {"jobs", "density", "params"}}
    return dict(sorted({**kept, "params": numbers or None}.items()))


def _rounded_in_merge(dtype: DType | None) -> DType | None:
    """Return the type that the merge rounds to; blocks are made by the writer, from float32."""
    from adapterkit.dtype import DType

    return DType.F32 if dtype is not None and dtype.quantised else dtype
