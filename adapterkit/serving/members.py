"""What stands on a stack, and why something could not be put there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapterkit.base import BaseModel
from adapterkit.errors import AdapterKitError
from adapterkit.model import AdapterTensorSet


class StackError(AdapterKitError):
    """An adapter could not be put on the stack; `code` is stable, for programs to switch on."""

    code = "load-failed"


class AdapterNotFoundError(StackError):
    """There is no such file, or no adapter of that name on the stack."""

    code = "not-found"
    exit_code = 3


class AdapterIncompatibleError(StackError):
    """The adapter does not fit the base of the stack."""

    code = "incompatible"
    exit_code = 4


class AdapterLoadFailedError(StackError):
    """The adapter is malformed, or is something that no stack can hold."""

    code = "load-failed"
    exit_code = 3


@dataclass(frozen=True, slots=True)
class StackedAdapter:
    """One adapter on a stack.

    Attributes:
        name: its name there.
        path: where it was read from; None for one in memory.
        scale: multiplier of its update; 0 keeps it loaded and inactive.
        adapter: what it holds.
        base: the model that it is for, given or found; None if it is unknown.
    """

    name: str
    path: Path | None
    scale: float
    adapter: AdapterTensorSet
    base: BaseModel | None = None

    @property
    def file(self) -> Path:
        """The file or directory that an engine is told.

        Raises:
            AdapterIncompatibleError: if the adapter is in memory.
        """
        if self.path is None:
            message = "is in memory, and an engine loads files; write it and load what was written"
            raise AdapterIncompatibleError(message, where=self.name)
        return self.path

    @property
    def bytes(self) -> int:
        """Bytes of its tensors as stored."""
        return sum(tensor.nbytes for tensor in self.adapter.tensors.values())
