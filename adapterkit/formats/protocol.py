"""What a format is made of: functions that read, that list what it cannot hold, that write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adapterkit.base import BaseModel
from adapterkit.dtype import DType

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """What a reader, lister or writer of a format is told beside the path and the adapter.

    Attributes:
        base: the base model, if given or found.
        dtype: stored type of the factors; None keeps each tensor's.
        moe_layout: `experts` or `fused`, the spelling of experts to write; None lets the base say.
        like: modules of the adapter that was written, when a file is read back: its spelling of
            names is used where a family has several.
        unverified: whether families without a passing oracle may be used.
        dialect: name or file of the key grammar of a hand-written adapter, if the file cannot tell.
        alpha: scale numerator, where the file does not hold it.
    """

    base: BaseModel | None = None
    dtype: DType | None = None
    moe_layout: str | None = None
    like: tuple[str, ...] = ()
    unverified: bool = False
    dialect: str | None = None
    alpha: float | None = None


class Reader(Protocol):
    """Reads a format."""

    def __call__(self, path: Path, options: FormatOptions, /) -> AdapterTensorSet:
        """Read headers now and data later; raise FormatError for malformed files."""
        ...


class Lister(Protocol):
    """Lists what a format cannot hold."""

    def __call__(self, adapter: AdapterTensorSet, options: FormatOptions, /) -> Sequence[Loss]:
        """List everything of the adapter that would be lost; read no tensor data."""
        ...


class Writer(Protocol):
    """Writes a format."""

    def __call__(self, adapter: AdapterTensorSet, path: Path, options: FormatOptions, /) -> None:
        """Write a file or directory at `path`, which does not exist; the caller moves it."""
        ...
