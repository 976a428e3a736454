"""Read and write adapter files of any format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adapterkit.base import BaseModel
from adapterkit.certificates import Making
from adapterkit.formats.protocol import FormatOptions
from adapterkit.loading import Need, load, open_model
from adapterkit.model import AdapterTensorSet
from adapterkit.saving import ProvenFile, admitted, destination_format, save, stored_type
from adapterkit.work import watchable


def read(
    source: Path | str,
    *,
    base: BaseModel | Path | str | None = None,
    moe_layout: str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
) -> AdapterTensorSet:
    """Read an adapter of any format; its tensors stay on disk until they are asked for.

    It is what the file holds, broken or not; the functions that take an adapter check it.

    Args:
        source: file, directory or hub id, told by its content.
        base: the base model, where a format's layout depends on it; by default the one that the
            adapter names, if it is in the local hub cache.
        moe_layout: `experts` or `fused`, the spelling of experts, where the file has none.
        dialect: key grammar of a hand-written adapter, where the file cannot tell.
        alpha: scale numerator, where the file does not hold it.
        as_format: name of the format to read it as, where its content does not tell.

    Raises:
        FormatError: if there is nothing, or something malformed, at the source.
        UnsupportedError: if it is no low-rank update, or cannot be read without a base.
    """
    loaded = load(
        source,
        base=base,
        moe_layout=moe_layout,
        dialect=dialect,
        alpha=alpha,
        as_format=as_format,
        need=Need.STORED,
    )
    if loaded.misfit is not None:
        raise loaded.misfit
    return loaded.adapter


@watchable
def write(
    source: AdapterTensorSet | Path | str,
    destination: Path | str,
    *,
    to: str | None = None,
    base: BaseModel | Path | str | None = None,
    outtype: str = "auto",
    force: bool = False,
    proof: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ProvenFile:
    """Write an adapter, read the file back, and keep it only if every update is the same.

    Args:
        source: an adapter, or a file or directory of any format.
        destination: file or directory to create.
        to: name of the format; by default a `.gguf` file is gguf and a directory is peft.
        base: the base model, where the format's layout depends on it.
        outtype: `auto` keeps every factor's dtype; `f32`, `f16`, `bf16`, `q8_0`.
        force: replace what is there.
        proof: whether the file carries what it was made from and what it holds, for `verify`.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        LossyConversionError: if the format cannot hold something; lists every reason.
        IncompatibleBaseError: if it does not fit the base.
        ProofError: if the file does not hold the same updates; it is removed.
        DestinationExistsError: if the destination exists and `force` is false.
        WriteError: if the output cannot be written.
    """
    del progress  # told by `watchable`
    destination = Path(destination)
    target = destination_format(destination, to, force=force)
    options = FormatOptions(base=open_model(base), dtype=stored_type(outtype))
    adapter = source if isinstance(source, AdapterTensorSet) else read(source, base=options.base)
    ready = admitted(adapter, target, options, into=None)
    making = Making("write") if proof else None
    return save(ready.adapter, destination, target, options, force=force, making=making)
