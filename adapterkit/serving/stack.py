"""Several adapters with scales, as an engine holds them at run time.

Engines add the adapters of a stack: y = W x + Σ scale_i ΔW_i x. A sum has no order; loading order,
priorities and the like change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import in_tower
from adapterkit.base import BaseModel
from adapterkit.base.fit import misfits
from adapterkit.base.places import Places
from adapterkit.errors import AdapterKitError, NotFoundError, UnsupportedError, UsageError
from adapterkit.factors import concatenated
from adapterkit.keys import Role, TensorKey
from adapterkit.loading import Need, load, open_model, recognise
from adapterkit.lowrank.differences import difference
from adapterkit.model import AdapterTensorSet, GgufSource, Update
from adapterkit.model.declared import UNDECIDED
from adapterkit.model.joining import joint_base, joint_source
from adapterkit.model.tying import one_spelling
from adapterkit.several import said_of_each
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

# Name of an adapter that has none.
_IN_MEMORY = "adapter"
# Two updates whose sum is smaller than this share of either cancel.
_CANCELLED = 0.05


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


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two adapters that meet on a module.

    Attributes:
        module: where.
        first: name of one adapter.
        second: name of the other.
        cosine: of the two scaled updates; None if one is zero.
        cancels: whether nearly nothing is left of them together.
    """

    module: str
    first: str
    second: str
    cosine: float | None
    cancels: bool


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
        return tuple(self._conflicts())

    def _conflicts(self) -> Iterator[Conflict]:
        active = [member for member in self._members.values() if member.scale]
        for place, first in enumerate(active):
            mine = {pair.module: pair for pair in _scaled_pairs(first.adapter, first.scale)}
            for second in active[place + 1 :]:
                for pair in _scaled_pairs(second.adapter, second.scale):
                    other = mine.get(pair.module)
                    if other and (other.kind, other.shape) == (pair.kind, pair.shape):
                        yield _conflict(other, pair, first.name, second.name)

    def combined(self) -> AdapterTensorSet:
        """Return the whole stack as one adapter: ranks add up, the update is the exact sum.

        Raises:
            AdapterLoadFailedError: if the stack is empty.
            AdapterIncompatibleError: if an adapter holds more than pairs of factors, or trained
                weights lie beside it.
        """
        members = [member for member in self._members.values() if member.scale]
        if not members:
            raise AdapterLoadFailedError("the stack holds no active adapter")
        for member in members:
            _check_summable(member)
        adapters, tied = one_spelling([member.adapter for member in members])
        groups: dict[str, list[Update]] = {}
        for member, adapter in zip(members, adapters, strict=True):
            for pair in _scaled_pairs(adapter, member.scale):
                groups.setdefault(pair.module, []).append(pair)
        return AdapterTensorSet.of(
            map(concatenated, groups.values()),
            _base_copies(members),
            base=joint_base(adapters),
            source=joint_source(adapters),
        ).replace(tied=tied)

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
            "original one; make it plain first (adapterkit convert --base BASE)",
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


def _scaled_pairs(adapter: AdapterTensorSet, scale: float) -> Iterator[Update]:
    for pair in adapter.pairs():
        yield replace(pair, scale=pair.scale * scale)


def _conflict(one: Update, other: Update, first: str, second: str) -> Conflict:
    # ‖ΔW₁ + ΔW₂‖ is the distance of ΔW₁ from -ΔW₂.
    opposite = difference(one, replace(other, scale=-other.scale))
    cosine = None if opposite.cosine is None else -opposite.cosine
    return Conflict(one.module, first, second, cosine, opposite.relative_error < _CANCELLED)


def _base_copies(members: Sequence[StackedAdapter]) -> dict[TensorKey, LazyTensor]:
    """Return the weights of the base that the files carry along."""
    found: dict[TensorKey, LazyTensor] = {}
    for member in members:
        for key, tensor in member.adapter.tensors.items():
            if key.role is not Role.BASE_COPY:
                continue
            if key in found and found[key].tobytes() != tensor.tobytes():
                message = "is a copy of the base's weight, and another adapter has another"
                raise AdapterIncompatibleError(message, path=member.path, where=str(key))
            found[key] = tensor
    return found


def _check_summable(member: StackedAdapter) -> None:
    adapter = member.adapter
    factors = {key for pair in adapter.pairs() for key in pair.keys}
    for key in adapter.tensors:
        if key not in factors and key.role is not Role.BASE_COPY:
            raise AdapterIncompatibleError(
                "is no pair of factors and cannot be added up", path=member.path, where=str(key)
            )
    if settings := [*adapter.settings, *(["engine_layout"] if adapter.engine_layout else [])]:
        raise AdapterIncompatibleError(
            f"{settings[0]} makes it more than a sum of updates", path=member.path
        )
    if trained := [file for file in adapter.beside if file.trained]:
        raise AdapterIncompatibleError(
            f"{trained[0].name} lies beside it ({trained[0].what}), and a sum of updates has no "
            "place for it; leave the file out of the folder to go without",
            path=member.path,
        )
