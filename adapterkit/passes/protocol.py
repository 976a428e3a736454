"""What every pass is: a named change of an adapter, with what it promises of the update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adapterkit.base import BaseModel
from adapterkit.late import called
from adapterkit.model import AdapterTensorSet
from adapterkit.notes import Loss, Note


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a pass may look at beside the adapter.

    Attributes:
        base: the base model, if given or found.
        losses: what a target cannot hold, and what may leave for it.
        allow_lossy: whether a pass may drop what it has to list as a loss.
        growing: whether the target takes new rows of a vocabulary from the adapter.
        dora_rank: of the LoRA that stands for a DoRA; None to leave it as it is.
    """

    base: BaseModel | None = None
    losses: tuple[Loss, ...] = ()
    allow_lossy: bool = False
    growing: bool = False
    dora_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass made of an adapter.

    Attributes:
        adapter: changed, or the same object.
        notes: what was done, in order.
        losses: what is dropped, or what would have to be and is still there.
    """

    adapter: AdapterTensorSet
    notes: tuple[Note, ...] = ()
    losses: tuple[Loss, ...] = ()


class Function(Protocol):
    """What makes the change."""

    def __call__(self, adapter: AdapterTensorSet, context: Context, /) -> Passed:
        """Return the adapter changed; raises UnsupportedError where the promise cannot be kept."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One change that adapters go through.

    Attributes:
        name: stable short name; engines name theirs in their `prepare`.
        promise: what holds of the result, one sentence.
        function: what makes the change, or its name as `module:name`.
        concerns: tells whether there may be something to change, else the adapter stays as it is;
            None for always.
    """

    name: str
    promise: str
    function: Function | str
    concerns: Callable[[AdapterTensorSet, Context], object] | None = None

    def change(self, adapter: AdapterTensorSet, context: Context) -> Passed:
        """Return the adapter changed, or as it is.

        Raises:
            UnsupportedError: if the promise cannot be kept.
        """
        if self.concerns is not None and not self.concerns(adapter, context):
            return Passed(adapter)
        done: Passed = called(self.function)(adapter, context)
        return done
