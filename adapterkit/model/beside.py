"""Files that lie beside an adapter's own and belong to what was trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.notes import Loss

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class BesideKind(StrEnum):
    """What a file beside an adapter is to it.

    WEIGHTS: trained with it, and it is another model without them. HEAD: trained with it, for
    training or scoring; no answer depends on it. COPY: the weights of a whole model, which the
    adapter does not need. UNKNOWN: weights of which no name tells what they are; they are
    mentioned, and go where a directory goes. TOKENIZER: of the tokenizer or the chat template,
    where nothing says that they are the base's own.
    """

    WEIGHTS = "weights"
    HEAD = "head"
    COPY = "copy"
    UNKNOWN = "unknown"
    TOKENIZER = "tokenizer"


@dataclass(frozen=True, slots=True)
class BesideFile:
    """One file beside an adapter.

    Attributes:
        name: path relative to the adapter's directory, with slashes.
        kind: what it is to the adapter.
        what: what it is, in words.
        bytes: its size.
        path: where it lies; two files are the same wherever they lie.
        apart: whether the base is known to have another one; of TOKENIZER only.
    """

    name: str
    kind: BesideKind
    what: str
    bytes: int
    path: Path = field(compare=False, repr=False)
    apart: bool = False

    @property
    def trained(self) -> bool:
        """Whether it holds weights that were trained with the adapter."""
        return self.kind in {BesideKind.WEIGHTS, BesideKind.HEAD}

    @property
    def needed(self) -> bool:
        """Whether the model answers otherwise without it."""
        return self.kind is BesideKind.WEIGHTS


def lost_beside(files: Iterable[BesideFile]) -> Iterator[Loss]:
    """Name what lies beside an adapter, for a target that has no place for it."""
    for file in files:
        if file.trained:
            message = (
                f"{file.what}, trained with the adapter, has no place in the output: keep it with "
                "a PEFT directory (adapterkit convert -o DIR), or leave it out with --allow-lossy"
            )
            yield Loss("beside", file.name, message, leaves=(file.name,))
        elif file.apart:
            message = f"{file.what} is not the base's, and the output does not hold it"
            yield Loss("tokenizer", file.name, message, blocks=False)
        elif file.kind is BesideKind.COPY:
            yield lost_copy(file)


def lost_trained(files: Iterable[BesideFile]) -> list[Loss]:
    """Name the trained files beside an adapter, for what makes another adapter or model of it."""
    return [loss for loss in lost_beside(files) if loss.blocks]


def lost_copy(file: BesideFile) -> Loss:
    """Say that a whole model is left where it is."""
    return Loss("model-copy", file.name, f"{file.what} is no part of the adapter", blocks=False)
