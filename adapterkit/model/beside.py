"""Files that lie beside an adapter's own and belong to what was trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.notes import Loss, first_and_more

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# What files of OTHER are, in words.
NO_WEIGHTS = "no weights"
# Names that are shown of files of one meaning, before the rest is counted.
MOST_NAMED = 4


class BesideKind(StrEnum):
    """What a file beside an adapter is to it.

    WEIGHTS: trained with it, and it is another model without them. HEAD: trained with it, for
    training or scoring; no answer depends on it. UNKNOWN: weights of which nothing tells what they
    are; they go where a directory goes, and are named elsewhere. COPY: the weights of a whole
    model, which the adapter does not need. ADAPTER: another adapter's. TOKENIZER: of the tokenizer
    or the chat template, where nothing says that they are the base's own. OTHER: no weights, such
    as a config or code; it goes where a directory goes. UNSEEN: a folder or link that was not
    looked into.
    """

    WEIGHTS = "weights"
    HEAD = "head"
    UNKNOWN = "unknown"
    COPY = "copy"
    ADAPTER = "adapter"
    TOKENIZER = "tokenizer"
    OTHER = "other"
    UNSEEN = "unseen"


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

    @property
    def carried(self) -> bool:
        """Whether it goes along where the adapter goes into a directory."""
        apart = {BesideKind.COPY, BesideKind.ADAPTER, BesideKind.UNSEEN}
        return self.kind not in apart


def lost_beside(files: Iterable[BesideFile]) -> Iterator[Loss]:
    """Name what lies beside an adapter, for a target that has no place for it."""
    files = tuple(files)
    for file in files:
        if file.trained:
            message = (
                f"{file.what}, trained with the adapter, has no place in the output: keep it with "
                "a PEFT directory (adapterkit convert SRC -o DIR), or leave it out with "
                "--allow-lossy"
            )
            yield Loss("beside", file.name, message, leaves=(file.name,))
        elif file.apart:
            message = f"{file.what} is not the base's, and the output does not hold it"
            yield Loss("tokenizer", file.name, message, blocks=False)
    if left := [file.name for file in files if file.carried and not (file.trained or file.apart)]:
        message = f"{_verb(left, 'lies', 'lie')} beside the adapter, and the output has no place"
        yield Loss("beside-files", first_and_more(left, MOST_NAMED), message, blocks=False)
    yield from lost_apart(files)


def lost_trained(files: Iterable[BesideFile]) -> list[Loss]:
    """Name the trained files beside an adapter, for what makes another adapter or model of it."""
    return [loss for loss in lost_beside(files) if loss.blocks]


def left_behind(files: Iterable[BesideFile]) -> list[str]:
    """Say of all other files that what is made of the adapter has no place for them."""
    return [f"{loss.subject}: {loss.message}" for loss in lost_beside(files) if not loss.blocks]


def lost_apart(files: Iterable[BesideFile]) -> Iterator[Loss]:
    """Say that whole models, other adapters and what was not looked into stay where they are."""
    files = tuple(files)
    for file in files:
        if file.kind is BesideKind.COPY:
            message = f"{file.what} is no part of the adapter"
            yield Loss("model-copy", file.name, message, blocks=False)
        elif file.kind is BesideKind.UNSEEN:
            yield Loss("unseen", file.name, f"{file.what}; it is left where it is", blocks=False)
    if others := [file.name for file in files if file.kind is BesideKind.ADAPTER]:
        message = _verb(others, "is another adapter", "are other adapters")
        yield Loss(
            "other-adapters",
            first_and_more(others, MOST_NAMED),
            f"{message} and no part of this one",
            blocks=False,
        )


def _verb(names: Sequence[str], one: str, several: str) -> str:
    return one if len(names) == 1 else several
