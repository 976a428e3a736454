"""A path that no format takes for its own: the error says what it is, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit import strangers
from adapterkit.containers.safetensors import read_safetensors
from adapterkit.errors import FormatError, NotFoundError, TruncatedFileError, UnknownFormatError

if TYPE_CHECKING:
    from pathlib import Path

_CONFIG = "adapter_config.json"


def unrecognised(path: Path) -> NotFoundError | UnknownFormatError:
    """Return the error for a path that no format takes, which says what it is as far as known.

    Raises:
        TruncatedFileError: if it is a safetensors file that was cut off.
    """
    if stranger := strangers.named(path):
        return (NotFoundError if path.is_dir() else UnknownFormatError)(stranger, path=path)
    config = (path if path.is_dir() else path.parent) / _CONFIG
    if config.is_file():
        what = (
            "says neither peft_type nor fine_tune_type, as no known program leaves it; download or "
            "copy it again"
        )
        return UnknownFormatError(what, path=config)
    if path.is_dir():
        what = f"no adapter here: no {_CONFIG}; pass the folder that holds it"
        return NotFoundError(what, path=path)
    beside = f"no {_CONFIG} lies beside it"
    names = _stored_names(path)
    if names == ():
        what = "holds no tensors; training saved an empty adapter, or this is no file of weights"
        return UnknownFormatError(what, path=path)
    if names:
        what = strangers.holding(names) or (
            f"holds {len(names)} tensors ({names[0]}...) and no factor of an update, and {beside}; "
            "of a model that was trained whole, the update is found with: adapterkit extract "
            "--base BASE --tuned MODEL -o ADAPTER"
        )
        return UnknownFormatError(what, path=path)
    what = f"is not an adapter of a known format, and {beside}; pass the folder that holds one"
    return UnknownFormatError(what, path=path)


def _stored_names(path: Path) -> tuple[str, ...] | None:
    """Return the names of a safetensors file's tensors, None of any other file."""
    try:
        return tuple(read_safetensors(path).tensors)
    except FormatError as error:
        if isinstance(error, TruncatedFileError) and path.suffix == ".safetensors":
            raise
        return None
