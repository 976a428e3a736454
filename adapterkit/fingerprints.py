"""What an adapter changes, in 4 kB, however it is stored.

The same update has the same fingerprint in every format and dtype (to its rounding), in every basis
of its factors, with its scale in alpha or in B, and under every spelling of its modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from adapterkit.errors import FormatError
from adapterkit.keys import PARTNERS, Role
from adapterkit.model import AdapterTensorSet, Kind, Update
from adapterkit.model.tying import spelled_out
from adapterkit.work import in_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from adapterkit.lowrank.products import LowRank

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

# Components that only say how a model is wrapped.
_WRAPPERS = {"base_model", "language_model", "model", "module", "text_model", "transformer"}
# Other programs' words for the parts of a block of experts.
_WORDS = {"block_sparse_moe": "mlp", "switch_mlp": "experts"}
_EXPERT_WORDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# What changes the model, or when it is changed, whatever the updates are.
_SETTINGS = ("initialisation", "layer_replication", "invocation_tokens")
_FUSED, _HALVES = "gate_up_proj", ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class ModuleFingerprint:
    """What one module's update is.

    Attributes:
        norm: ‖ΔW‖, Frobenius, scale included.
        sketch: 16 numbers of float16, little-endian, of ΔW / ‖ΔW‖; they do not depend on the name.
    """

    norm: float
    sketch: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What an adapter's updates are, all together and one by one; updates of zero are left out.

    Attributes:
        version: of the sketch; those of different versions cannot be compared.
        norm: ‖ΔW‖ over all modules, exact.
        sketch: 1,024 numbers of float32, little-endian, of ΔW / ‖ΔW‖.
        modules: module -> what its update is; experts of one tensor count as one.
        unplaced: modules in llama.cpp's row order, because no base was given: their sketch is that
            of other rows.
        beside: what an adapter does beside its updates and is not in the sketch: trained tensors
            by their keys, and settings by their names.
    """

    version: int
    norm: float
    sketch: bytes
    modules: Mapping[str, ModuleFingerprint]
    unplaced: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def vector(self) -> Array:
        """The sketch as numbers."""
        import numpy as np

        return np.frombuffer(self.sketch, "<f4").astype(np.float64)


def fingerprinted(adapter: AdapterTensorSet) -> Fingerprint:
    """Return the fingerprint of an adapter; every factor is read once.

    Raises:
        FormatError: if a factor holds NaN or infinity, or does not fit its partner.
    """
    import numpy as np

    from adapterkit.lowrank import fingerprints

    whole = np.zeros((fingerprints.WIDTH, fingerprints.WIDTH))
    modules: dict[str, ModuleFingerprint] = {}
    squared = 0.0
    pairs = list(spelled_out(adapter).pairs())
    for pair, (signed, alone, energy) in zip(pairs, in_threads(_sketched, pairs), strict=True):
        whole += signed
        if energy:
            numbers = fingerprints.brief(alone) / energy**0.5
            stored = numbers.astype("<f2").tobytes()
            modules[pair.module] = ModuleFingerprint(energy**0.5, stored)
        squared += energy
    norm = squared**0.5
    return Fingerprint(
        version=fingerprints.VERSION,
        norm=norm,
        sketch=(whole / (norm or 1.0)).astype("<f4").tobytes(),
        modules=modules,
        unplaced=tuple(adapter.engine_layout),
        beside=tuple(_beside(adapter)),
    )


def _sketched(pair: Update) -> tuple[Array, Array, float]:
    """Return the sketch of an update under its names' signs, without them, and ‖ΔW‖²."""
    import numpy as np

    from adapterkit.lowrank import distances, fingerprints

    signed = np.zeros((fingerprints.WIDTH, fingerprints.WIDTH))
    alone, energy = np.zeros_like(signed), 0.0
    with np.errstate(all="ignore"):  # what is no number shows in the norm
        for names, update in _parts(pair):
            sketches = fingerprints.sketch(update)
            alone += sketches.sum(axis=0)
            for name, each in zip(names, sketches, strict=True):
                signed += fingerprints.pattern(name) * each
            energy += distances.norm(update) ** 2
    if not math.isfinite(energy):
        raise FormatError("holds NaN or infinity, or overflows", where=pair.module)
    return signed, alone, energy


def unit_distance(first: AdapterTensorSet, second: AdapterTensorSet, *, sign: int = 1) -> float:
    """Return ‖ΔW₁/‖ΔW₁‖ - sign · ΔW₂/‖ΔW₂‖‖ over all modules, exact from the factors.

    Args:
        first: one adapter that changes something.
        second: another, of any format.
        sign: -1 to measure how far the second is from the opposite of the first.
    """
    from adapterkit.lowrank import distances
    from adapterkit.lowrank.products import LowRank

    sides = [_matrices(adapter) for adapter in (first, second)]
    norms = [math.sqrt(sum(distances.norm(each) ** 2 for each in side.values())) for side in sides]
    factors = 1 / norms[0], sign / norms[1]
    one, other = (
        {name: LowRank(update.b * factor, update.a) for name, update in side.items()}
        for side, factor in zip(sides, factors, strict=True)
    )
    apart = [distances.distance(one[name], other[name]) for name in one.keys() & other.keys()]
    apart += [distances.norm(one[name]) for name in one.keys() - other.keys()]
    apart += [distances.norm(other[name]) for name in other.keys() - one.keys()]
    return math.sqrt(sum(each**2 for each in apart))


def _matrices(adapter: AdapterTensorSet) -> dict[str, LowRank]:
    """Return every single matrix by its name."""
    from adapterkit.lowrank.products import LowRank

    return {
        name: LowRank(b, a)
        for pair in spelled_out(adapter).pairs()
        for names, update in _parts(pair)
        for name, b, a in zip(names, update.b, update.a, strict=True)
    }


def _parts(pair: Update) -> Iterator[tuple[list[str], LowRank]]:
    """Yield the matrices of an update as stacks, with the names that every spelling agrees on."""
    from adapterkit.lowrank.products import LowRank, whole

    update, name = whole(pair), spelling(pair.module)
    if pair.embedding:
        update = LowRank(update.a.swapaxes(1, 2), update.b.swapaxes(1, 2))
    container, _, leaf = name.rpartition(".")
    if pair.kind is not Kind.EXPERTS:
        yield [name], update
    elif leaf != _FUSED:
        yield _numbered(container, leaf, pair.experts), update
    else:
        half = update.shape[0] // 2
        for part, rows in zip(_HALVES, (update.b[:, :half], update.b[:, half:]), strict=True):
            yield _numbered(container, part, pair.experts), LowRank(rows, update.a)


def _numbered(container: str, leaf: str, count: int) -> list[str]:
    return [f"{container}.{number}.{leaf}" for number in range(count)]


def spelling(module: str) -> str:
    """Return the one name of a module that programs spell in several ways."""
    names = [_WORDS.get(each, each) for each in module.split(".") if each not in _WRAPPERS]
    if "experts" in names[:-1]:
        names[-1] = _EXPERT_WORDS.get(names[-1], names[-1])
    return ".".join(names) or module


def _beside(adapter: AdapterTensorSet) -> Iterator[str]:
    paired = {key for pair in adapter.pairs() for key in pair.keys}
    for key in adapter.tensors:
        if key.role is not Role.BASE_COPY and not (key.role in PARTNERS and key in paired):
            yield str(key)
    yield from (file.name for file in adapter.beside if file.trained)
    yield from (name for name in _SETTINGS if getattr(adapter, name))
