"""Tensors of an adapter that are no factors: merged where that is exact, else refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.advice import MERGE_INSTEAD
from adapterkit.base.copies import first_other_row
from adapterkit.errors import FormatError, IncompatibleBaseError, UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.lowrank.differences import all_finite
from adapterkit.lowrank.products import wide
from adapterkit.merging.planning import called
from adapterkit.merging.storing import widest
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from adapterkit.dtype import DType
    from adapterkit.merging.planning import Source
    from adapterkit.merging.registry import MethodSpec

_ABSOLUTE = {Role.FULL, Role.TOKEN_ROWS}
# Weights that add up to 1 in decimal do so in binary only nearly.
_ONE = 1e-9


@dataclass(frozen=True, slots=True)
class Beside:
    """The merged tensors that are no factors.

    Attributes:
        tensors: by key.
        how: key as text -> what was done, one phrase.
        token_indices: the tokens of merged rows.
    """

    tensors: Mapping[TensorKey, LazyTensor]
    how: Mapping[str, str]
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()


def merge_beside(
    found: Sequence[Source],
    spec: MethodSpec,
    scales: Mapping[str, float],
    biases: Sequence[TensorKey],
    dtype: DType | None,
) -> Beside:
    """Merge biases of B, whole parameters and token rows.

    A bias of B is scaled like its update, so Σ wᵢsᵢbᵢ is its exact sum. A whole parameter Mᵢ stands
    for Mᵢ - W with an unknown W: Σ wᵢMᵢ is exact if the weights of the adapters that hold it add
    up to 1, and not known otherwise.

    Args:
        found: the adapters.
        spec: the method; vectors and whole parameters of several adapters need one that sums.
        scales: the merged scale of each module with factors.
        biases: keys of the bias of B for every module, if any adapter has one.
        dtype: stored type; None for the widest of the sources'.

    Raises:
        UnsupportedError: if a tensor cannot be merged; names it.
    """
    tensors: dict[TensorKey, LazyTensor] = {}
    how: dict[str, str] = {}
    for key in biases:
        tensors[key] = _bias(key, found, spec, scales[key.module], dtype)
        how[str(key)] = "weighted sum"
    for key in dict.fromkeys(key for source in found for key in source.adapter.tensors):
        if key.role in _ABSOLUTE:
            tensors[key], how[str(key)] = _absolute(key, found, spec, dtype)
        elif key.role is Role.BASE_COPY:
            tensors[key] = _frozen(key, found)
            how[str(key)] = "copied: the frozen table that training started from"
    return Beside(tensors, how, _tokens(found))


def _frozen(key: TensorKey, found: Sequence[Source]) -> LazyTensor:
    """Return the frozen copy of a table, which all that hold one must have alike."""
    (first, held), *others = _holders(key, found)
    for source, tensor in others:
        alike = tensor.shape == held.shape
        row = first_other_row(held, tensor, 0, held.shape[0]) if alike else None
        if not alike or row is not None:
            what = f"row {row}" if alike else f"shape, {list(tensor.shape)},"
            raise UnsupportedError(
                f"is a frozen copy with another {what} than in {first.label}: they were trained on "
                "other bases, and no adapter adds to both; leave one out",
                path=source.label,
                where=str(key),
            )
    return held


def bias_keys(found: Sequence[Source], modules: Sequence[str]) -> list[TensorKey]:
    """Return a bias for every module if any adapter has one: it holds for all modules or none."""
    having = any(key.role is Role.LORA_BIAS for s in found for key in s.adapter.tensors)
    return [TensorKey(module, Role.LORA_BIAS) for module in modules] if having else []


def _holders(key: TensorKey, found: Sequence[Source]) -> list[tuple[Source, LazyTensor]]:
    return [(s, s.adapter.tensors[key]) for s in found if key in s.adapter.tensors]


def _bias(
    key: TensorKey,
    found: Sequence[Source],
    spec: MethodSpec,
    scale: float,
    dtype: DType | None,
) -> LazyTensor:
    holders = _holders(key, found)
    if holders and not spec.sums:
        raise UnsupportedError(
            f"a bias on B can be summed, and {spec.name} does not sum; use svd",
            path=holders[0][0].label,
            where=key.module,
        )
    rows = _rows(key.module, found)
    total = np.zeros(rows)
    for source, tensor in holders:
        if tensor.shape != (rows,):
            raise FormatError(
                f"has shape {list(tensor.shape)}, the module has {rows} rows",
                path=source.label,
                where=str(key),
            )
        weight = source.weight_of(key.module) * source.adapter.scales.get(key.module, 1.0)
        total += weight * _finite(key, tensor, source)
    return LazyTensor.of(total / scale, dtype or widest([t for _, t in holders]))


def _rows(module: str, found: Sequence[Source]) -> int:
    pairs = (pair for source in found for pair in source.adapter.pairs())
    return next(pair.matrix_shape[0] for pair in pairs if pair.module == module)


def _absolute(
    key: TensorKey, found: Sequence[Source], spec: MethodSpec, dtype: DType | None
) -> tuple[LazyTensor, str]:
    holders = _holders(key, found)
    weights = [source.weight_of(*called(key)) for source, _ in holders]
    for source, tensor in holders[1:]:
        if tensor.shape != holders[0][1].shape:
            raise IncompatibleBaseError(
                f"has shape {list(tensor.shape)}, and {list(holders[0][1].shape)} in "
                f"{holders[0][0].label}",
                path=source.label,
                where=str(key),
            )
    if abs(sum(weights) - 1) > _ONE:
        raise UnsupportedError(
            f"is stored whole, and the weights of the adapters that hold it add up to "
            f"{sum(weights):g}: without the base that is known only if they add up to 1; "
            f"{MERGE_INSTEAD}",
            path=holders[0][0].label,
            where=str(key),
        )
    if len(holders) == 1:
        return _copied(key, *holders[0], dtype), f"copied from {holders[0][0].label}"
    if not spec.sums:
        raise UnsupportedError(
            f"is stored whole in {len(holders)} adapters, and {spec.name} is no weighted sum; "
            f"{MERGE_INSTEAD}",
            path=holders[0][0].label,
            where=str(key),
        )
    total = sum(
        (w * _finite(key, t, s) for w, (s, t) in zip(weights, holders, strict=True)),
        np.zeros(holders[0][1].shape),
    )
    return LazyTensor.of(total, dtype or widest([t for _, t in holders])), "weighted sum"


def _copied(key: TensorKey, source: Source, tensor: LazyTensor, dtype: DType | None) -> LazyTensor:
    if tensor.dtype.floating and not all_finite(tensor):
        raise _not_finite(key, source)
    return tensor.cast(dtype) if dtype and tensor.dtype.floating else tensor


def _finite(key: TensorKey, tensor: LazyTensor, source: Source) -> np.ndarray[Any, Any]:
    values = wide(tensor)
    if not np.isfinite(values).all():
        raise _not_finite(key, source)
    return values


def _not_finite(key: TensorKey, source: Source) -> FormatError:
    return FormatError("holds NaN or infinity", path=source.label, where=str(key))


def _tokens(found: Sequence[Source]) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    """Return the token numbers of merged rows; all that hold rows must mean the same tokens."""
    held = [(source, rows) for source in found if (rows := _rows_by_module(source))]
    for source, rows in held[1:]:
        if rows != held[0][1]:
            raise UnsupportedError(
                f"holds rows of other tokens than {held[0][0].label} (trainable_token_indices); "
                f"{MERGE_INSTEAD}",
                path=source.label,
                where=next(iter(rows)),
            )
    return held[0][0].adapter.token_indices if held else ()


def _rows_by_module(source: Source) -> dict[str, tuple[int, ...]]:
    adapter = source.adapter
    rows = (key.module for key in adapter.tensors if key.role is Role.TOKEN_ROWS)
    return {module: adapter.tokens_of(module) for module in rows}
