"""What makes an adapter broken whatever it is for: halves, ranks, shapes, types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.keys import PARTNERS, Role, TensorKey
from adapterkit.model.declared import unstored
from adapterkit.model.update import GATHER, ONE_RANK, Kind, Update, has_axes, is_slice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.model.adapter import AdapterTensorSet
    from adapterkit.tensor import LazyTensor

_SHAPED = {
    Kind.LINEAR: " of a linear layer",
    Kind.EMBEDDING: " of an embedding",
    Kind.EXPERTS: " of stacked experts",
    Kind.CONVOLUTION: " of a convolution",
}
# What is nothing without factors.
_OF_FACTORS = {Role.MAGNITUDE, Role.COLUMN_MAGNITUDE, Role.LORA_BIAS}
_UNSTORED = {"modules_to_save": "unsaved"}


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that makes an adapter broken.

    Attributes:
        kind: `half`, `ranks`, `empty`, `integers`, `axes`, `beside` of what acts beside
            factors and does not fit them, `declared-rank`, or for a setting that
            promises what is not there `unstored` and `unsaved` (of `modules_to_save`); `unplaced`
            for a module whose name in the model nothing says.
        where: tensor or module.
        message: what is the case.
        embedding: whether it is about the factors of an embedding.
    """

    kind: str
    where: str
    message: str
    embedding: bool = False


def defects(adapter: AdapterTensorSet) -> Iterator[Defect]:
    """Yield every defect, by tensor and then those of the config; no tensor data is read."""
    whole = "" if not is_slice(_linear_factors(adapter)) else f": this {ONE_RANK}; {GATHER}"
    for key, tensor in adapter.tensors.items():
        yield from _of_tensor(adapter, key, tensor, whole)
    for module, (declared, stored) in adapter.rank_conflicts.items():
        message = f"the config declares rank {declared}, the tensors have {stored}"
        yield Defect("declared-rank", module, message)
    for setting, modules, message in unstored(adapter):
        yield Defect(_UNSTORED.get(setting, "unstored"), modules, message)
    for module, reason in adapter.unplaced.items():
        yield Defect("unplaced", module, reason)
    yield from _of_token_rows(adapter)


def problems(adapter: AdapterTensorSet) -> list[str]:
    """Return one sentence for each defect, each naming its tensor; no tensor data is read."""
    return [_sentence(defect) for defect in defects(adapter)]


def check_structure(adapter: AdapterTensorSet) -> None:
    """Refuse an adapter that is broken whatever it is for.

    Raises:
        FormatError: with the first problem, and how many more there are.
        UnsupportedError: if nothing else is wrong, and it is not known what modules are meant.
    """
    found = list(defects(adapter))
    broken = [_sentence(defect) for defect in found if defect.kind != "unplaced"]
    path = adapter.provenance.path if adapter.provenance else None
    if broken:
        more = f" (and {len(broken) - 1} more defects)" if len(broken) > 1 else ""
        raise FormatError(f"{broken[0]}{more}", path=path)
    if found:
        more = f" (and {len(found) - 1} more modules)" if len(found) > 1 else ""
        raise UnsupportedError(f"{found[0].message}{more}", path=path, where=found[0].where)


def _sentence(defect: Defect) -> str:
    aside = " (saved from a shard; gather first)" if defect.kind == "empty" else ""
    return f"{defect.where}: {defect.message}{aside}"


def _linear_factors(
    adapter: AdapterTensorSet,
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for key, a in adapter.tensors.items():
        b = adapter.tensors.get(TensorKey(key.module, Role.LORA_B))
        if key.role is Role.LORA_A and b is not None:
            yield a.shape, b.shape


def _of_tensor(
    adapter: AdapterTensorSet, key: TensorKey, tensor: LazyTensor, sliced: str
) -> Iterator[Defect]:
    name, shape = str(key), list(tensor.shape)
    if not tensor.size:
        yield Defect("empty", name, f"is empty, shape {shape}")
        return
    if not tensor.dtype.floating:
        yield Defect("integers", name, f"holds {tensor.dtype} values, not real numbers")
    partner = PARTNERS.get(key.role)
    if partner is None:
        yield from _of_others(adapter.update_of(key.module), key, tensor)
        return
    other = adapter.tensors.get(TensorKey(key.module, partner))
    kind = adapter.kind_of(key)
    if not has_axes(kind, tensor):
        of = _SHAPED.get(kind, "") if len(shape) > 1 else ""
        yield Defect("axes", name, f"has shape {shape}, not that of a factor{of}")
    elif other is None:
        yield Defect("half", name, f"has no {partner} beside it")
    elif key.role in {Role.LORA_A, Role.EMBEDDING_A}:
        yield from _of_ranks(Update(key.module, tensor, other, 1.0, kind), sliced)


def _of_ranks(update: Update, sliced: str) -> Iterator[Defect]:
    said_of_b = not update.b.size or not has_axes(update.kind, update.b)
    if not update.sound and not said_of_b:
        shapes = f"A is {list(update.a.shape)}, B is {list(update.b.shape)}"
        yield Defect("ranks", update.module, f"ranks disagree, {shapes}{sliced}", update.embedding)


def _of_others(update: Update | None, key: TensorKey, tensor: LazyTensor) -> Iterator[Defect]:
    """Compare what acts beside the factors of a module with them."""
    if update is None:
        if key.role in _OF_FACTORS:
            yield Defect("half", str(key), "has no factors beside it")
        return
    expected = update.beside(key.role) if update.sound else None
    if expected is None:
        return
    shape = tensor.shape
    if update.kind is Kind.CONVOLUTION:  # PEFT keeps the axes of the kernel
        shape = tuple(size for size in shape if size != 1) or (1,)
    if key.role is Role.TOKEN_ROWS:
        shape = (0, *shape[1:])
    if shape != expected:
        shapes = f"A is {list(update.a.shape)}, B is {list(update.b.shape)}"
        yield Defect("beside", str(key), f"has shape {list(tensor.shape)}, and {shapes}")


def _of_token_rows(adapter: AdapterTensorSet) -> Iterator[Defect]:
    """Compare the number of rows with the number of tokens that are said to be theirs."""
    for key, rows in adapter.tensors.items():
        if key.role is not Role.TOKEN_ROWS or not rows.shape:
            continue
        tokens = adapter.token_indices
        if isinstance(tokens, Mapping):
            named = [each for name, each in tokens.items() if f".{key.module}".endswith(f".{name}")]
            tokens = named[0] if len(named) == 1 else ()
        if tokens and len(tokens) != rows.shape[0]:
            message = f"trainable_token_indices names {len(tokens)} tokens, and it has "
            yield Defect("unstored", str(key), f"{message}{rows.shape[0]} rows")
