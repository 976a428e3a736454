"""What is told of an adapter beside its tensors: losses, notes, where it is from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.keys import TensorKey

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Loss:
    """Something a target cannot hold.

    Attributes:
        code: stable short name, such as `dora` or `tied-embedding`.
        subject: the module, tensor or setting concerned.
        message: why, and what to do instead.
        drops: the tensors that `allow_lossy` leaves out; empty where dropping is no way out.
        blocks: false for a warning, which is reported and stops nothing.
    """

    code: str
    subject: str
    message: str
    drops: tuple[TensorKey, ...] = ()
    blocks: bool = True

    @property
    def droppable(self) -> bool:
        """Whether `allow_lossy` may write the rest without it."""
        return bool(self.drops)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an adapter was read from.

    Attributes:
        path: file or directory.
        format: name of the format, as `adapterkit formats` lists it.
        notes: what the reader normalised on the way, one sentence each.
    """

    path: Path
    format: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BaseReference:
    """What an adapter says of the model it was trained on; every field may be unknown.

    Attributes:
        name: hub id or path.
        revision: hub revision.
        architecture: GGUF architecture name or Hugging Face class, as recorded.
    """

    name: str | None = None
    revision: str | None = None
    architecture: str | None = None


def first_and_more(names: Sequence[str], shown: int = 1) -> str:
    """Return `a and 13 more` for many names, all of them if there are no more than `shown`."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
