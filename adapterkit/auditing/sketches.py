"""Which of many adapters are copies, and which pairs of the others are worth a close look.

A sketch of an update is P · ΔW · Q with random P and Q, the same for all adapters: inner products
of sketches are those of the updates, give or take a share of 1 / 32 for a single matrix, and less
for many together. So the work grows with the adapters, and not with their pairs.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.lowrank.products import Array, updates
from adapterkit.work import in_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.model import AdapterTensorSet, Update

_WIDTH = 32


def copies(adapters: Sequence[AdapterTensorSet]) -> list[tuple[int, ...]]:
    """Return the numbers of the adapters, those of the same updates, bit for bit, together."""
    groups: dict[str, list[int]] = {}
    for number, content in enumerate(in_threads(_content, adapters)):
        groups.setdefault(content, []).append(number)
    return [tuple(group) for group in groups.values()]


def _content(adapter: AdapterTensorSet) -> str:
    digest = hashlib.blake2b(repr(sorted(adapter.scales.items())).encode())
    for key in sorted(adapter.tensors):
        tensor = adapter.tensors[key]
        digest.update(f"{key} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def sketched_gram(adapters: Sequence[AdapterTensorSet]) -> Array:
    """Return estimates of ⟨ΔWᵢ, ΔWⱼ⟩ over all modules, (T, T); other shapes are another module."""
    numbers = range(len(adapters))
    gram = np.zeros((len(adapters),) * 2)
    sides: dict[str, list[tuple[int, Update]]] = {}
    for number, adapter in zip(numbers, adapters, strict=True):
        for pair in adapter.pairs():
            name = f"{pair.module} {pair.matrix_shape} {pair.experts} {pair.kind}"
            sides.setdefault(name, []).append((number, pair))

    def of_module(item: tuple[str, list[tuple[int, Update]]]) -> tuple[list[int], Array]:
        name, held = item
        return [number for number, _ in held], _sketches(name, [pair for _, pair in held])

    for held, sketches in in_threads(of_module, sides.items()):
        gram[np.ix_(held, held)] += sketches @ sketches.T
    return gram


def _sketches(name: str, pairs: Sequence[Update]) -> Array:
    """Return one row for each update of a module, its experts side by side."""
    out, inputs = pairs[0].matrix_shape
    random = np.random.default_rng(zlib.crc32(name.encode()))
    left = random.standard_normal((_WIDTH, out)) / _WIDTH**0.5
    right = random.standard_normal((inputs, _WIDTH)) / _WIDTH**0.5
    rows = [
        [((left @ each.b) @ (each.a @ right)).reshape(-1) for each in updates(p)] for p in pairs
    ]
    return np.stack([np.concatenate(row) for row in rows])
