"""What is said of several adapters together, for each of them that is loaded alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from adapterkit.errors import AdapterKitError
from adapterkit.loading import Need, load, recognise
from adapterkit.model import AdapterTensorSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.base import BaseModel

_Item = TypeVar("_Item")


def each_of(given: _Item | Iterable[_Item]) -> list[_Item]:
    """Return what is given as a list: one that stands alone is one, and a text is not its letters.

    To a type checker a text is a sequence of texts, so that no checker finds the missing brackets.
    """
    alone = isinstance(given, (str, Path, AdapterTensorSet)) or not isinstance(given, Iterable)
    return [cast("_Item", given)] if alone else list(cast("Iterable[_Item]", given))


def named(source: AdapterTensorSet | Path | str) -> str:
    """Return what an adapter is called: its path, of one in memory that which it was read from."""
    if isinstance(source, AdapterTensorSet):
        return str(source.provenance.path) if source.provenance else "in memory"
    return str(source)


@dataclass(frozen=True, slots=True)
class Said:
    """What one adapter is loaded with.

    Attributes:
        dialect: key grammar of a hand-written adapter.
        alpha: scale numerator.
    """

    dialect: str | None = None
    alpha: float | None = None


def said_of_each(
    sources: Sequence[AdapterTensorSet | Path | str],
    *,
    base: BaseModel | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
) -> tuple[Said, ...]:
    """Return what is said of each adapter, where a dialect and an alpha are said of all together.

    As in `load_all`, a dialect overrules no config beside another, and an alpha is for those that
    leave it open. Where none does, each gets it, and refuses it if it states another.
    """
    every = (Said(dialect, alpha),) * len(sources)
    if len(sources) == 1 or (dialect is None and alpha is None):
        return every
    said = [Said(_for_this(source, dialect, as_format), alpha) for source in sources]
    if alpha is None:
        return tuple(said)
    needing = [
        _leaves_open(source, each, base, as_format)
        for source, each in zip(sources, said, strict=True)
    ]
    if not any(needing):
        return tuple(said)
    return tuple(
        each if needs else replace(each, alpha=None)
        for each, needs in zip(said, needing, strict=True)
    )


def _for_this(
    source: AdapterTensorSet | Path | str, dialect: str | None, as_format: str | None
) -> str | None:
    if dialect is None or isinstance(source, AdapterTensorSet):
        return None
    try:
        found = recognise(source, dialect=dialect, as_format=as_format, alone=False)
    except AdapterKitError:
        return dialect  # who loads it says what is wrong
    return dialect if found.format.takes_dialect else None


def _leaves_open(
    source: AdapterTensorSet | Path | str,
    said: Said,
    base: BaseModel | None,
    as_format: str | None,
) -> bool:
    if isinstance(source, AdapterTensorSet):
        return False
    try:
        load(source, base=base, dialect=said.dialect, as_format=as_format, need=Need.STORED)
    except AdapterKitError as error:
        return error.needs == "alpha"
    return False
