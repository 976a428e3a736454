"""Several adapters with scales, as an engine holds them at run time.

Engines add the adapters of a stack: y = W x + Σ scale_i ΔW_i x. A sum has no order; loading order,
priorities and the like change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import in_tower
from adapterkit.base import BaseModel
from adapterkit.base.fit import misfits
from adapterkit.base.places import Places
from adapterkit.errors import AdapterKitError, NotFoundError, UnsupportedError, UsageError
from adapterkit.loading import Need, load, open_model, recognise
from adapterkit.model import AdapterTensorSet, GgufSource
from adapterkit.model.declared import UNDECIDED
from adapterkit.serving.members import (
    AdapterIncompatibleError,
    AdapterLoadFailedError,
    AdapterNotFoundError,
    StackedAdapter,
    StackError,
)
from adapterkit.serving.sums import Conflict, combined, conflicts
from adapterkit.several import said_of_each

if TYPE_CHECKING:
    from collections.abc import Iterator

# Name of an adapter that has none.
_IN_MEMORY = "adapter"


class AdapterStack:
    """Adapters by name, each with a scale, on one base.

    Args:
        base: base model that every adapter is checked against as it is loaded; None for no check.
    """

    def __init__(self, base: BaseModel | Path | str | None = None) -> None:
        self._base = open_model(base)
        self._members: dict[str, StackedAdapter] = {}

    @property
    def base(self) -> Path | None:
        """Where the base of the stack lies, file or directory; None if it has none."""
        if self._base is None:
            return None
        path = self._base.path
        return path.parent if path.name == "config.json" else path

    def load(
        self,
        source: AdapterTensorSet | Path | str,
        *,
        name: str | None = None,
        scale: float = 1.0,
        dialect: str | None = None,
        alpha: float | None = None,
        as_format: str | None = None,
    ) -> str:
        """Read an adapter, check it, and add it; return its name.

        Args:
            source: file, directory or hub id; or an adapter, which no engine can be told of.
            name: its name on the stack; by default that of the file or directory, with the folders
                above it where that name is taken.
            scale: multiplier of its update.
            dialect: key grammar of a hand-written adapter, where the file cannot tell.
            alpha: scale numerator, where the file does not hold it.
            as_format: name of the format to read it as, where its content does not tell.

        Raises:
            AdapterNotFoundError: if there is nothing at the path.
            AdapterLoadFailedError: if it is malformed, not finite in its scale, or its name taken.
            AdapterIncompatibleError: if it does not fit the base, or is for a base that its
                initialisation changed: an engine would load it onto the original; or if trained
                weights lie beside it.
            UsageError: if a dialect or format is unknown, or the file cannot say something.
        """
        path: Path | None = None
        try:
            found = (
                source
                if isinstance(source, AdapterTensorSet)
                else recognise(source, dialect=dialect, as_format=as_format)
            )
            path = None if isinstance(found, AdapterTensorSet) else found.path
            chosen = name or (self._free_name(path) if path else _IN_MEMORY)
            if chosen in self._members:
                message = "is loaded already; give it another name (NAME=ADAPTER)"
                raise AdapterLoadFailedError(message, where=chosen)
            # What is put on the stack is the file as it is: an engine makes nothing plain.
            loaded = load(found, base=self._base, dialect=dialect, alpha=alpha, need=Need.SOUND)
            adapter = loaded.adapter
        except (StackError, UsageError):
            raise
        except NotFoundError as error:
            missing = error.path is None or not Path(error.path).exists()
            kind = AdapterNotFoundError if missing else AdapterLoadFailedError
            raise kind(error.message, path=error.path, where=error.where) from error
        except UnsupportedError as error:
            at = error.path or path
            raise AdapterIncompatibleError(error.message, path=at, where=error.where) from error
        except AdapterKitError as error:
            at = error.path or path
            raise AdapterLoadFailedError(error.message, path=at, where=error.where) from error
        _check_plain(adapter, path)
        self._check_base(adapter, path)
        self._members[chosen] = StackedAdapter(
            chosen, path, _finite(scale, chosen), adapter, loaded.base
        )
        return chosen

    def load_all(
        self,
        sources: Sequence[AdapterTensorSet | Path | str],
        *,
        names: Sequence[str | None] | None = None,
        scales: Sequence[float] | None = None,
        dialect: str | None = None,
        alpha: float | None = None,
        as_format: str | None = None,
    ) -> tuple[str, ...]:
        """Load adapters in order, as `load` does each; return their names.

        Args:
            sources: files, directories, hub ids or adapters.
            names: of each, None for that of its file or directory.
            scales: of each; 1 if omitted.
            dialect: key grammar of those whose file cannot tell.
            alpha: scale numerator of those whose file does not hold it.
            as_format: name of the format to read them as, where their content does not tell.

        Raises:
            StackError: as `load` does; those before stay loaded.
            UsageError: likewise.
        """
        said = said_of_each(
            sources, base=self._base, dialect=dialect, alpha=alpha, as_format=as_format
        )
        chosen = names or [None] * len(sources)
        given = scales or [1.0] * len(sources)
        return tuple(
            self.load(
                source,
                name=name,
                scale=scale,
                dialect=own.dialect,
                alpha=own.alpha,
                as_format=as_format,
            )
            for source, name, scale, own in zip(sources, chosen, given, said, strict=True)
        )

    def _free_name(self, path: Path) -> str:
        """Return the shortest end of a path that no member has: `ck`, then `run2-ck`."""
        place = path.resolve()
        name = place.name if place.is_dir() else place.stem
        known = (member.path for member in self._members.values())
        if any(other is not None and other.resolve() == place for other in known):
            return name  # the same adapter again: no folder tells it apart
        for folder in place.parents:
            if name not in self._members or not folder.name:
                break
            name = f"{folder.name}-{name}"
        return name

    def _check_base(self, adapter: AdapterTensorSet, path: Path | None) -> None:
        base = self._base
        if base is None:
            return
        recorded = adapter.base.architecture
        if (
            isinstance(adapter.source, GgufSource)
            and recorded
            and recorded != base.architecture.gguf
        ):
            message = f"is made for {recorded}, the base is {base.architecture.gguf}"
            raise AdapterIncompatibleError(message, path=path)
        places = Places(base)
        for pair in adapter.pairs():
            tower = base.architecture.known and in_tower(pair.module)
            if places.has(pair.module) is False and not tower:
                message = f"is no module of {base.architecture.title}"
                raise AdapterIncompatibleError(message, path=path, where=pair.module)
        for wrong in misfits(adapter, base):
            if wrong.kind != "unknown":
                raise AdapterIncompatibleError(wrong.message, path=path, where=wrong.module)

    def set_scale(self, name: str, scale: float) -> None:
        """Change the scale of one adapter.

        Raises:
            AdapterNotFoundError: if there is none of that name.
        """
        self._members[name] = replace(self._get(name), scale=_finite(scale, name))

    def unload(self, name: str) -> None:
        """Take one adapter off the stack.

        Raises:
            AdapterNotFoundError: if there is none of that name.
        """
        del self._members[self._get(name).name]

    def clear(self) -> None:
        """Take every adapter off the stack."""
        self._members.clear()

    def list(self) -> tuple[StackedAdapter, ...]:
        """Return what is on the stack."""
        return tuple(self._members.values())

    def __repr__(self) -> str:
        members = ", ".join(f"{each.name} @ {each.scale:g}" for each in self)
        return f"<AdapterStack: {members or 'empty'}>"

    def __iter__(self) -> Iterator[StackedAdapter]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    @property
    def bytes(self) -> int:
        """Bytes of all tensors on the stack as stored."""
        return sum(member.bytes for member in self._members.values())

    def conflicts(self) -> tuple[Conflict, ...]:
        """Return every module that two active adapters change, and how much of it is left."""
        return tuple(conflicts(self._active()))

    def combined(self) -> AdapterTensorSet:
        """Return the whole stack as one adapter: ranks add up, the update is the exact sum.

        Raises:
            AdapterLoadFailedError: if the stack is empty.
            AdapterIncompatibleError: if an adapter holds more than pairs of factors, or trained
                weights lie beside it.
        """
        if members := self._active():
            return combined(members)
        raise AdapterLoadFailedError("the stack holds no active adapter")

    def _active(self) -> Sequence[StackedAdapter]:
        return [member for member in self._members.values() if member.scale]

    def _get(self, name: str) -> StackedAdapter:
        if name not in self._members:
            known = ", ".join(self._members) or "none"
            raise AdapterNotFoundError(f"is not on the stack; loaded: {known}", where=name)
        return self._members[name]


def _check_plain(adapter: AdapterTensorSet, path: Path | None) -> None:
    if adapter.pooled_inputs:
        raise AdapterIncompatibleError(UNDECIDED, path=path)
    if init := adapter.initialisation:
        raise AdapterIncompatibleError(
            f"init_lora_weights = {init!r} changed the base, and an engine adds B · A to the "
            "original one; make it plain first (adapterkit convert SRC -o DIR --base BASE)",
            path=path,
        )
    if needed := [file for file in adapter.beside if file.needed]:
        raise AdapterIncompatibleError(
            f"{needed[0].name} lies beside it ({needed[0].what}), and an engine loads the adapter "
            "alone; serve the model that it belongs to",
            path=path,
        )


def _finite(scale: float, name: str) -> float:
    if not math.isfinite(scale):
        raise AdapterLoadFailedError(f"scale {scale} is no finite number", where=name)
    return float(scale)
