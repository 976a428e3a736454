"""What is told of an adapter beside its tensors: losses, notes, where it is from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Self

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
        leaves: the files beside the adapter that it leaves out.
    """

    code: str
    subject: str
    message: str
    drops: tuple[TensorKey, ...] = ()
    blocks: bool = True
    leaves: tuple[str, ...] = ()

    @property
    def droppable(self) -> bool:
        """Whether `allow_lossy` may write the rest without it."""
        return bool(self.drops or self.leaves)


class NoteKind(StrEnum):
    """What a program may want to know of a note without reading it.

    ADAPTER_NAME, PREFIX: names of tensors had that to be cleaned up. STRAY: the same of names that
    are no factor's. VOCABULARY: rows of a module
    were cut or padded to the base's. ORIGINAL: the base is the original of the quantised one that
    the adapter names. OTHER_BASE: the base is of another architecture than the one that the adapter
    names. OTHER_CONFIG: a config beside the file says other than the one in it. UNSELECTED: which
    modules the config selects could not be told. REMARK: anything else.
    """

    ADAPTER_NAME = "adapter-name"
    PREFIX = "prefix"
    STRAY = "stray"
    VOCABULARY = "vocabulary"
    ORIGINAL = "original"
    OTHER_BASE = "other-base"
    OTHER_CONFIG = "other-config"
    UNSELECTED = "unselected"
    REMARK = "remark"


class Note(str):
    """A sentence on what was normalised.

    Attributes:
        kind: what it is about.
        subject: the module concerned, if it is one.
        text: the sentence without its subject.
    """

    __slots__ = ("kind", "subject", "text")

    text: str
    kind: NoteKind
    subject: str | None

    def __new__(
        cls, text: str, kind: NoteKind = NoteKind.REMARK, subject: str | None = None
    ) -> Self:
        """Return the sentence; `subject: ` goes before it."""
        note = super().__new__(cls, f"{subject}: {text}" if subject else text)
        note.text, note.kind, note.subject = text, kind, subject
        return note


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an adapter was read from.

    Attributes:
        path: file or directory.
        format: name of the format, as `adapterkit list formats` lists it.
        notes: what the reader normalised on the way, one sentence each; those that a program may
            have to know are `Note`s.
        options: of the command line, without which it is not read.
    """

    path: Path
    format: str
    notes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


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
