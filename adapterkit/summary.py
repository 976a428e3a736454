"""What an adapter is, in numbers: the answer of `adapterkit inspect`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from adapterkit.base import BaseModel
from adapterkit.errors import IncompatibleBaseError
from adapterkit.keys import Role
from adapterkit.loading import Need, load
from adapterkit.model import AdapterTensorSet
from adapterkit.model.beside import MOST_NAMED, NO_WEIGHTS
from adapterkit.model.declared import undeclared
from adapterkit.model.defects import problems
from adapterkit.model.update import Kind
from adapterkit.notes import first_and_more
from adapterkit.tensor import LazyTensor
from adapterkit.text import PLAIN, Pen, Shown, sheet, size, spread
from adapterkit.work import tracked, watchable

_Value = TypeVar("_Value", bound=Hashable)

# Elements that are read at a time.
_BLOCK = 1 << 20
# What is stored whole: the values themselves, not factors of a change to them.
_WHOLE = {Role.FULL, Role.TOKEN_ROWS}
_SHOWN_ROLES = {
    Role.MAGNITUDE: "DoRA magnitudes",
    Role.COLUMN_MAGNITUDE: "DoRA magnitudes by column",
    Role.LORA_BIAS: "biases on B (lora_bias)",
    Role.EMBEDDING_A: "LoRA of embeddings",
    Role.BASE_COPY: "frozen copies of base weights",
}
_SHOWN_KINDS = {Kind.EXPERTS: "stacked experts", Kind.CONVOLUTION: "convolutions"}


@dataclass(frozen=True, slots=True)
class BesideEntry:
    """A file beside an adapter's own.

    Attributes:
        name: path in the adapter's directory.
        what: what it is.
        trained: whether it holds weights that were trained with the adapter.
        bytes: its size.
    """

    name: str
    what: str
    trained: bool
    bytes: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Summary(Shown):
    """What an adapter is, without its values.

    Attributes:
        source: file or directory it was read from; None for an adapter made in memory.
        format: name of its format; None for an adapter made in memory.
        base_model: hub id or path of the model it was trained on, as recorded.
        architecture: GGUF architecture or Hugging Face class of that model, as recorded.
        tuner: `LoRA`, `DoRA` if it holds magnitudes, `none` if it only replaces parameters. rsLoRA
            is a LoRA: it shows in the scales.
        modules: number of modules that have factors.
        parameters: number of stored elements.
        ranks: rank -> number of modules.
        scales: effective multiplier of B · A -> number of modules.
        dtypes: stored type -> number of tensors.
        bytes: size of all tensors, without any header.
        sha256: digest of the tensors' contents, see `digest`.
        targets: last component of the module names -> number of modules.
        traits: what it is beside factors and scales: settings that change the meaning of its
            tensors, as `name = value`, and kinds of tensors.
        replaced: parameters that are stored whole (`modules_to_save`, biases, token rows).
        beside: what lies beside its own files and belongs to what was trained.
        notes: what the reader normalised, one sentence each.
        problems: what makes the adapter unfit for any use, one sentence each.
    """

    source: str | None
    format: str | None
    base_model: str | None
    architecture: str | None
    tuner: str
    modules: int
    parameters: int
    ranks: Mapping[int, int]
    scales: Mapping[float, int]
    dtypes: Mapping[str, int]
    bytes: int
    sha256: str
    targets: Mapping[str, int]
    traits: tuple[str, ...]
    replaced: tuple[str, ...]
    beside: tuple[BesideEntry, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def text(self, pen: Pen = PLAIN) -> str:
        """Return a name and a value a line."""
        return sheet(_entries(self), pen=pen)


@watchable
def inspect(
    source: AdapterTensorSet | Path | str,
    *,
    base: BaseModel | Path | str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Read an adapter of any format and summarise it; no tensor is decoded.

    Args:
        source: file, directory or hub id; or an adapter.
        base: base model, for the few formats whose meaning depends on it; by default the one that
            the adapter names, if it is in the local hub cache.
        dialect: key grammar of a hand-written adapter, where the file cannot tell.
        alpha: scale numerator, where the file does not hold it.
        as_format: name of the format to read it as, where its content does not tell.
        progress: told how many tensors of how many are done, stage by stage.

    Raises:
        FormatError: if there is no adapter at the path, or the file is malformed.
        UnsupportedError: if it is an adapter of a kind that has no neutral form.
    """
    del progress  # told by `watchable`
    loaded = load(
        source, base=base, dialect=dialect, alpha=alpha, as_format=as_format, need=Need.STORED
    )
    if loaded.misfit is not None and loaded.given:
        raise loaded.misfit
    found = summarize(loaded.adapter)
    return replace(found, notes=(*loaded.told, *_misfit(loaded.misfit)))


def _misfit(error: IncompatibleBaseError | None) -> tuple[str, ...]:
    return (f"the base in the hub cache does not fit: {error}",) if error else ()


def summarize(adapter: AdapterTensorSet) -> Summary:
    """Summarise an adapter, a broken one too; every tensor's bytes are read once, for the digest.

    Raises:
        FormatError: if a tensor's bytes cannot be read.
    """
    source = adapter.provenance
    adapted = _adapted(adapter)
    return Summary(
        source=str(source.path) if source else None,
        format=source.format if source else None,
        base_model=adapter.base.name,
        architecture=adapter.base.architecture,
        tuner=_tuner(adapter),
        modules=len(adapted),
        parameters=adapter.parameters,
        ranks=_counts(pair.rank for pair in adapter.pairs()),
        scales=_counts(adapter.scales[module] for module in adapted if module in adapter.scales),
        dtypes=_counts(tensor.dtype.value for tensor in adapter.tensors.values()),
        bytes=sum(tensor.nbytes for tensor in adapter.tensors.values()),
        sha256=digest(adapter),
        targets=_counts(map(_target, adapted)),
        traits=tuple(_traits(adapter)),
        replaced=tuple(key.module for key in adapter.tensors if key.role in _WHOLE),
        beside=tuple(BesideEntry(f.name, f.what, f.trained, f.bytes) for f in adapter.beside),
        notes=source.notes if source else (),
        problems=(*problems(adapter), *(f"{s.subject}: {s.message}" for s in undeclared(adapter))),
    )


def _entries(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("source", summary.source or ""),
        ("format", summary.format or ""),
        ("base model", summary.base_model or ""),
        ("architecture", summary.architecture or ""),
        ("tuner", summary.tuner),
        ("modules", f"{summary.modules:,}"),
        ("targets", spread(summary.targets, summary.modules, always=True)),
        ("rank", spread(summary.ranks, summary.modules)),
        ("scale", spread(summary.scales, summary.modules)),
        ("traits", ", ".join(summary.traits)),
        ("replaced", ", ".join(summary.replaced)),
        *(("beside", each) for each in _beside(summary.beside)),
        ("parameters", f"{summary.parameters:,}"),
        ("dtype", spread(summary.dtypes, sum(summary.dtypes.values()))),
        ("size", size(summary.bytes)),
        ("sha256", summary.sha256),
        *(("problem", problem) for problem in summary.problems),
    ]


def _beside(files: Sequence[BesideEntry]) -> Iterator[str]:
    """Name each file, and of those that hold no weights a few on one line."""
    others = [file.name for file in files if file.what == NO_WEIGHTS]
    for file in files:
        if file.what != NO_WEIGHTS:
            yield f"{file.name}: {file.what}" + (f", {size(file.bytes)}" if file.bytes else "")
    if others:
        yield f"{first_and_more(others, MOST_NAMED)}: {NO_WEIGHTS}"


def digest(adapter: AdapterTensorSet) -> str:
    """Return the sha256 of what the tensors hold, whatever file they came from.

    It is taken over one line of JSON for each tensor, `[module, role, dtype, shape, sha256]` with
    the sha256 of its little-endian C-order bytes; the lines are sorted. So it does not depend on
    the container, on the order of the tensors, on metadata or on the scales. A GGUF adapter of a
    family whose rows llama.cpp reorders has another digest than its PEFT source.
    """
    lines = sorted(
        json.dumps(
            (
                key.module,
                key.role.value,
                tensor.dtype.value,
                tensor.shape,
                _sha256(tensor),
            )
        )
        for key, tensor in tracked(adapter.tensors.items())
    )
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def _sha256(tensor: LazyTensor) -> str:
    whole = hashlib.sha256()
    for block in tensor.blocks(_BLOCK):
        whole.update(block.tobytes())
    return whole.hexdigest()


def _adapted(adapter: AdapterTensorSet) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.module for key in adapter.tensors if key.role not in _WHOLE))


def _tuner(adapter: AdapterTensorSet) -> str:
    roles = {key.role for key in adapter.tensors}
    if roles & {Role.MAGNITUDE, Role.COLUMN_MAGNITUDE}:
        return "DoRA"
    return "LoRA" if roles - _WHOLE else "none"


def _traits(adapter: AdapterTensorSet) -> Iterator[str]:
    yield from (f"{name} = {value!r}" for name, value in adapter.settings.items())
    roles = {key.role for key in adapter.tensors}
    yield from (shown for role, shown in _SHOWN_ROLES.items() if role in roles)
    kinds = set(adapter.kinds.values())
    yield from (shown for kind, shown in _SHOWN_KINDS.items() if kind in kinds)


def _target(module: str) -> str:
    """Return the last component that is a name, with the numbers that follow it."""
    names = module.split(".")
    while len(names) > 1 and names[-1].isdecimal():
        names.pop()
    return module[len(".".join(names)) - len(names[-1]) :]


def _counts(values: Iterable[_Value]) -> dict[_Value, int]:
    return dict(sorted(Counter(values).items()))
