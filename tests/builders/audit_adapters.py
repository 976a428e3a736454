"""Adapters in memory with known updates, for audits and compressions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.formats.protocol import FormatOptions
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet, Kind
from adapterkit.notes import BaseReference
from adapterkit.registry import spec
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Array = np.ndarray[Any, Any]
Pair = tuple[Array, Array]


def adapter(
    pairs: Mapping[str, Pair],
    *,
    scale: float | Mapping[str, float] = 1.0,
    embeddings: tuple[str, ...] = (),
    kinds: Mapping[str, Kind] | None = None,
    more: Mapping[TensorKey, LazyTensor] | None = None,
) -> AdapterTensorSet:
    """Return an adapter of factors (A, B) by module."""
    tensors: dict[TensorKey, LazyTensor] = {}
    for module, (a, b) in pairs.items():
        roles = (Role.LORA_A, Role.LORA_B)
        if module in embeddings:
            roles = (Role.EMBEDDING_A, Role.EMBEDDING_B)
        for role, array in zip(roles, (a, b), strict=True):
            tensors[TensorKey(module, role)] = LazyTensor.of(array)
    scales = {name: scale if isinstance(scale, float) else scale[name] for name in pairs}
    return AdapterTensorSet(
        tensors={**tensors, **(more or {})},
        scales=scales,
        kinds=kinds or {},
        base=BaseReference(name="org/base"),
    )


def orthonormal(random: np.random.Generator, rows: int, columns: int) -> Array:
    """Return (rows, columns) with orthonormal columns."""
    return np.linalg.qr(random.standard_normal((rows, columns)))[0]


def planted(
    values: Array | list[float], out: int, inputs: int, *, seed: int = 0, lopsided: float = 0.0
) -> Pair:
    """Return A and B whose product has exactly these singular values, in a random basis."""
    random = np.random.default_rng(seed)
    rank = len(values)
    left, right = orthonormal(random, out, rank), orthonormal(random, inputs, rank)
    basis = orthonormal(random, rank, rank) * np.exp(lopsided * random.standard_normal(rank))
    return np.linalg.solve(basis, right.T), (left * np.asarray(values)) @ basis


def gaussian(out: int, inputs: int, rank: int, *, seed: int = 0, dtype: Any = np.float32) -> Pair:
    """Return random A and B."""
    random = np.random.default_rng(seed)
    a = random.standard_normal((rank, inputs)) / inputs**0.5
    return a.astype(dtype), random.standard_normal((out, rank)).astype(dtype)


def layered(
    layers: int = 3, *, rank: int = 4, seed: int = 0, dtype: Any = np.float32
) -> dict[str, Pair]:
    """Return pairs of a small llama: q and down projections with falling spectra."""
    pairs: dict[str, Pair] = {}
    for layer in range(layers):
        for place, (name, out, inputs) in enumerate(
            (("self_attn.q_proj", 32, 32), ("mlp.down_proj", 32, 96))
        ):
            a, b = gaussian(out, inputs, rank, seed=seed + 7 * layer + place, dtype=np.float64)
            b *= np.exp(-np.arange(rank) / (1 + layer))
            pairs[f"model.layers.{layer}.{name}"] = (a.astype(dtype), b.astype(dtype))
    return pairs


def written(whole: AdapterTensorSet, path: Path, form: str = "peft") -> Path:
    """Write an adapter to disk and return where."""
    spec(form).write(whole, path, FormatOptions())
    return path


def decaying(rows: int, columns: int, power: float, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    count = min(rows, columns)
    values = (1.0 + np.arange(count)) ** -power
    return (orthonormal(random, rows, count) * values) @ orthonormal(random, columns, count).T
