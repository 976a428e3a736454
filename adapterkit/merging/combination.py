"""One matrix of one module: the updates of all adapters into one, by any method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.errors import UsageError, unknown
from adapterkit.lowrank.decomposition import EXACT_ZERO, Decomposition, decompose
from adapterkit.lowrank.distances import cut_distance, distance, gram, norm
from adapterkit.lowrank.operators import Plane
from adapterkit.lowrank.products import Array, LowRank, stacked
from adapterkit.lowrank.ranks import predicted_error
from adapterkit.lowrank.sketching import compressed, compressed_within
from adapterkit.merging import subspaces
from adapterkit.merging.elementwise import merged
from adapterkit.merging.registry import SPACES, Kind, MethodSpec

if TYPE_CHECKING:
    from adapterkit.lowrank.products import Key

_ACCURATE = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How updates combine, the same for all modules.

    Attributes:
        spec: the method.
        parameters: its numbers, defaults filled in.
        space: where the method is applied; None and `delta` for the updates themselves.
        seed: of a random one.
        rank: how much of a result without a small rank is wanted; None for Σ rᵢ.
        tolerance: relative error of such a result, whose rank grows until it is kept; None if
            none was asked for.
    """

    spec: MethodSpec
    parameters: Mapping[str, float | None]
    space: str | None
    seed: int
    rank: int | None
    tolerance: float | None = None

    @property
    def dense(self) -> bool:
        """Whether the result has no small rank, so that an adapter can only approximate it."""
        return self.spec.kind is Kind.ELEMENTWISE and self.space == "delta"

    @property
    def basis_dependent(self) -> bool:
        """Whether (B · G⁻¹, G · A), the same update, gives another result."""
        rule = self.spec.kind is Kind.ELEMENTWISE
        return self.space == "core" if rule else self.spec.basis_dependent


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a method made of one matrix.

    Attributes:
        exact: the result itself, factored or dense.
        spectrum: its leading singular values; None where factors are to be stored as they are.
        coefficients: (T,), where it is Σ aᵢ ΔWᵢ with a's of the method's own.
    """

    exact: LowRank | Plane
    spectrum: Decomposition | None
    coefficients: Array | None = None

    @property
    def norm(self) -> float:
        """‖ΔW‖, Frobenius, of the result itself."""
        if self.spectrum is not None:
            return self.spectrum.norm
        if isinstance(self.exact, LowRank):
            return norm(self.exact)
        return self.exact.norm()

    def factors(self, rank: int, scale: float) -> tuple[Array, Array]:
        """Return B (out, rank) and A (rank, in), such that scale · B · A is the result or near it.

        Raises:
            TypeError: if it is dense and was not decomposed.
        """
        if self.spectrum is not None:
            return self.spectrum.factors(rank, scale)
        if isinstance(self.exact, LowRank):
            return self.exact.b / scale, self.exact.a
        raise TypeError("a dense result has no factors before it is decomposed")

    def predicted_error(self, rank: int) -> float:
        """Return the Frobenius norm of what a truncation to a rank leaves out."""
        return predicted_error(self.spectrum, rank) if self.spectrum is not None else 0.0

    def error(self, made: LowRank, stored: LowRank) -> float:
        """Return the Frobenius norm of what a stored update is off by.

        Args:
            made: of the rank that is stored, before rounding.
            stored: its factors, rounded.
        """
        if not isinstance(self.exact, LowRank):
            return self.exact.distance(stored)
        if self.spectrum is None:
            return distance(self.exact, stored)
        return cut_distance(self.spectrum, made, stored, self.predicted_error(made.rank))


def combine(
    updates: Sequence[LowRank], weights: Array, how: Combination, place: tuple[str, int]
) -> Outcome:
    """Apply a method to the updates of one matrix.

    Args:
        updates: one for each adapter, of one shape; rank 0 where it has none.
        weights: (T,).
        how: the method and its settings.
        place: module and expert, which random numbers are keyed by.
    """
    spec = how.spec
    if spec.kind is Kind.ELEMENTWISE:
        return _elementwise(updates, weights, how, place)
    if spec.kind is Kind.COEFFICIENTS:
        # A plain sum asks for no inner product, and they are a third of its work.
        inner = np.zeros((len(updates),) * 2) if spec.sums else gram(updates)
        coefficients = np.asarray(spec.function(inner, weights, how.parameters))
        exact = stacked(updates, list(coefficients))
        return Outcome(exact, decompose(exact, EXACT_ZERO), coefficients)
    numbers = {**how.parameters, "rank": how.rank}
    space = _space(updates, how)
    exact = space.back(spec.function(space.updates, weights, numbers))
    if spec.kind is Kind.STACK:
        return Outcome(exact, None)
    return Outcome(exact, decompose(exact, EXACT_ZERO))


def _elementwise(
    updates: Sequence[LowRank], weights: Array, how: Combination, place: tuple[str, int]
) -> Outcome:
    keys = keys_of(updates, weights, how, place)
    rule = how.spec.function
    if how.space == "delta":
        whole = merged(updates, weights, rule, how.parameters, keys)
        total = sum(update.rank for update in updates)
        start = np.concatenate([update.a for update in updates])
        key = _key(how, place, -1)
        if how.tolerance is not None:
            return Outcome(whole, compressed_within(whole, how.tolerance, start, key))
        rank = min(how.rank or total, *whole.shape)
        return Outcome(whole, compressed(whole, rank, start, key))
    space = _space(updates, how)
    small = merged(space.updates, weights, rule, how.parameters, keys).dense()
    exact = space.back(LowRank(np.eye(len(small)), small))
    return Outcome(exact, decompose(exact, EXACT_ZERO))


def _space(updates: Sequence[LowRank], how: Combination) -> subspaces.Space:
    """Return the updates in the space that was asked for; as they are where none was."""
    if how.space in {None, "delta"}:
        return subspaces.Space(tuple(updates), lambda merged: merged)
    return subspaces.SPACES[how.space or ""](updates)


def keys_of(
    updates: Sequence[LowRank], weights: Array, how: Combination, place: tuple[str, int]
) -> list[Key]:
    """Return one key for each update, which goes with the update and not with its place.

    Updates are told apart by their direction: u ᵀΔW v / ‖ΔW‖ for fixed random u and v. Unlike the
    bytes of its factors that is the same in every basis, and unlike a name or a place in the list
    it stays when files are moved or reordered.
    """
    if not how.spec.random:
        return [(0, 0)] * len(updates)
    generator = np.random.Generator(np.random.Philox(key=np.zeros(2, dtype=np.uint64)))
    rows, columns = updates[0].shape
    u, v = generator.standard_normal(rows), generator.standard_normal(columns)
    norms = np.sqrt(np.abs(np.diag(gram(updates))))

    def direction(index: int) -> tuple[float, float]:
        update, norm = updates[index], norms[index]
        seen = float((u @ update.b) @ (update.a @ v))
        # Rounded, so that equal directions are equal whatever basis they were computed in.
        size = float(f"{weights[index] * norm:.8g}")
        return round(seen / norm / _ACCURATE) * _ACCURATE if norm else 0.0, size

    order = sorted(range(len(updates)), key=direction)
    keys: list[Key] = [(0, 0)] * len(updates)
    for rank, index in enumerate(order):
        keys[index] = _key(how, place, rank)
    return keys


def _key(how: Combination, place: tuple[str, int], adapter: int) -> Key:
    text = json.dumps([how.seed, how.spec.name, *place, adapter])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def check(how: Combination) -> None:
    """Refuse settings that a method cannot follow.

    Raises:
        UsageError: names the setting.
    """
    spec = how.spec
    factors = spec.kind in {Kind.FACTORS, Kind.FLAT} and not spec.basis_dependent
    spaced = factors or spec.kind is Kind.ELEMENTWISE
    if how.space is not None and not spaced:
        raise UsageError(f"{spec.name} is the same in every space; leave out the space")
    density = how.parameters.get("density")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"density is {density:g}, not a share above 0 and up to 1")
    if spec.kind is Kind.FLAT and how.tolerance:
        raise UsageError(f"{spec.name} makes all singular values equal; give a rank instead of tol")
    common = how.parameters.get("common")
    if common is not None and not 0 <= common <= 1:
        raise UsageError(f"common is {common:g}, not a share from 0 to 1")
    if spec.kind is Kind.STACK and (how.rank is not None or how.tolerance):
        raise UsageError(f"{spec.name} keeps every rank; use svd to choose one")


def numbers(
    spec: MethodSpec, density: float | None, params: Mapping[str, float] | None
) -> dict[str, float | None]:
    """Return a method's numbers, defaults filled in.

    Raises:
        UsageError: if it has no such number.
    """
    given = dict(params or {})
    if density is not None:
        given["density"] = density
    for name in given:
        if name not in spec.parameters:
            known = ", ".join(spec.parameters) or "none"
            raise UsageError(f"{spec.name} has no parameter {name!r}; its parameters: {known}")
    return {**spec.parameters, **given}


def space_of(spec: MethodSpec, space: str | None) -> str | None:
    """Return where a method is applied.

    Raises:
        UsageError: if there is no such space.
    """
    if space is not None and space not in SPACES:
        raise unknown("space", space, SPACES)
    return space or spec.space


def seed_of(spec: MethodSpec, seed: int | None) -> int:
    """Return the seed, 0 by default.

    Raises:
        UsageError: if the method draws nothing.
    """
    if seed is not None and not spec.random:
        raise UsageError(f"{spec.name} draws nothing at random; leave out the seed")
    return seed or 0
