"""One tensor's difference as factors: chosen rank, rounded once, measured against the files."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError
from adapterkit.extraction.difference import differ, difference
from adapterkit.extraction.ranks import choose
from adapterkit.extraction.report import ExtractedModule, LeftOver
from adapterkit.extraction.twins import Twin
from adapterkit.factors import turned
from adapterkit.lowrank.distances import distance
from adapterkit.lowrank.operators import Plane
from adapterkit.lowrank.products import LowRank, nothing, stored, updates
from adapterkit.lowrank.ranks import predicted_error
from adapterkit.model import Kind, Update

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adapterkit.extraction.difference import Stored
    from adapterkit.extraction.ranks import Wish
    from adapterkit.lowrank.products import Key

_SIXTEEN = (DType.BF16, DType.F16)
# What 16 bits may add to the square of an error that is there anyway.
_NEGLIGIBLE = 0.02
# Share of ‖ΔW‖ from which on it is called rounding and nothing else.
_ROUNDED = 0.8
_ROUNDING = "differs by no more than the rounding of its stored type"
_FLAT = "has no singular value that stands out of the rest; --rank or --tol takes the largest"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one tensor; nothing at all where the checkpoints agree.

    Attributes:
        twin: the tensor.
        pairs: its factors, one for each of its modules.
        module: what they hold.
        left: what is left over instead.
        capped: whether more ranks would have been asked for.
    """

    twin: Twin
    pairs: tuple[Update, ...] = ()
    module: ExtractedModule | None = None
    left: LeftOver | None = None
    capped: bool = False

    @property
    def noise(self) -> bool:
        """Whether it is left over because nothing but rounding differs."""
        return self.left is not None and self.left.rounding


@dataclass(frozen=True, slots=True)
class _Part:
    """One matrix: its difference, and the best factors of the rank that it gets.

    Attributes:
        plane: ΔW, None where it is zero.
        update: B · A, float64.
        norm: ‖ΔW‖.
        base_norm: ‖W_base‖.
        rounding: norm of the rounding.
        lacking: ‖ΔW - B · A‖, as the singular values say.
        capped: whether more ranks would have been asked for.
    """

    plane: Plane | None
    update: LowRank
    norm: float = 0.0
    base_norm: float = 0.0
    rounding: float = 0.0
    lacking: float = 0.0
    capped: bool = False


def extract_tensor(twin: Twin, *, asked: Wish, seed: int, dtype: DType | None) -> Outcome:
    """Factor the difference of one tensor, or say why that is not done.

    Args:
        twin: the tensor in both checkpoints.
        asked: which rank.
        seed: of the random directions, which depend on the tensor's name besides, not on threads.
        dtype: stored type of the factors; None chooses by what it costs.

    Raises:
        FormatError: if a checkpoint holds NaN or infinity.
        UnsupportedError: if a stored type cannot be decoded.
    """
    changed = [differ(old, new) for old, new in zip(twin.base, twin.tuned, strict=True)]
    if twin.base and not any(changed):
        return Outcome(twin)
    if not twin.base or not twin.tensor.dtype.floating:
        return _left(twin, twin.reason, None)
    parts: list[_Part] = []
    for place, (old, new) in enumerate(zip(twin.base, twin.tuned, strict=True)):
        key = _key(seed, twin.name, place)
        # Of a stack, only one expert's difference is in memory at a time.
        alone = len(changed) == 1
        wanted = changed[place] and not twin.reason
        parts.append(_part(old, new, key, asked, factored=wanted, alone=alone))
    norm, base_norm = _total(p.norm for p in parts), _total(p.base_norm for p in parts)
    if not norm:
        return Outcome(twin)  # other bytes, such as another type, and the same numbers
    reason = twin.reason or _without_rank(parts)
    relative = norm / base_norm if base_norm else None
    if reason:
        return _left(twin, reason, relative)
    return _factored(twin, parts, relative, asked, dtype)


def _part(old: Stored, new: Stored, key: Key, asked: Wish, *, factored: bool, alone: bool) -> _Part:
    found = difference(old, new)
    if not factored or not found.norm:
        return _Part(None, nothing(old.shape), found.norm, found.base_norm)
    chosen = choose(found, asked, key)
    update = LowRank(*chosen.spectrum.factors(chosen.rank)) if chosen.rank else nothing(old.shape)
    return _Part(
        found.plane if alone else found.streamed,
        update,
        found.norm,
        found.base_norm,
        found.rounding,
        predicted_error(chosen.spectrum, chosen.rank),
        chosen.capped,
    )


def _without_rank(parts: Sequence[_Part]) -> str:
    """Return why nothing gets a rank; an empty text where something does."""
    if any(part.update.rank for part in parts):
        return ""
    rounding, norm = _total(p.rounding for p in parts), _total(p.norm for p in parts)
    return _ROUNDING if rounding >= _ROUNDED * norm else _FLAT


def _total(norms: Iterable[float]) -> float:
    return sum(norm**2 for norm in norms) ** 0.5


def _left(twin: Twin, reason: str, relative: float | None) -> Outcome:
    rounding = reason == _ROUNDING
    left = LeftOver(tensor=twin.name, reason=reason, relative_norm=relative, rounding=rounding)
    return Outcome(twin, left=left)


def _factored(
    twin: Twin, parts: Sequence[_Part], relative: float | None, asked: Wish, dtype: DType | None
) -> Outcome:
    pair = _rounded(twin, parts, asked, dtype)
    norm = _total(part.norm for part in parts)
    error = _total(
        part.plane.distance(update)
        for part, update in zip(parts, as_stored(twin, pair), strict=True)
        if part.plane is not None
    )
    if not math.isfinite(error):
        raise UnsupportedError(
            f"overflows {pair.b.dtype}; store it as f32 or bf16 (--outtype)", where=twin.name
        )
    rounding = _total(part.rounding for part in parts) or None
    module = ExtractedModule(
        module=twin.modules[0],
        tensor=twin.name,
        rank=pair.rank,
        norm=norm,
        relative_norm=relative,
        relative_error=error / norm,
        rounding=None if rounding is None else rounding / norm,
        explained=None if rounding is None or not error else min((rounding / error) ** 2, 1.0),
        dtype=pair.b.dtype.value,
    )
    pairs = (pair, *(_of_output(pair, name) for name in twin.modules[1:]))
    return Outcome(twin, pairs, module, capped=any(part.capped for part in parts))


def _rounded(twin: Twin, parts: Sequence[_Part], asked: Wish, dtype: DType | None) -> Update:
    """Return the factors of all matrices at one rank, rounded once."""
    wanted = dtype or _narrow(twin)
    pair = _stored(twin, parts, wanted)
    if dtype is not None or wanted not in _SIXTEEN:
        return pair
    lost = _total(
        distance(part.update, update)
        for part, update in zip(parts, as_stored(twin, pair), strict=True)
    )
    lacking = _total(part.lacking for part in parts)
    allowed = asked.rule.tolerance * _total(part.norm for part in parts)
    enough = lost**2 <= _NEGLIGIBLE * lacking**2
    if enough and (not allowed or math.hypot(lost, lacking) <= allowed):
        return pair
    return _stored(twin, parts, DType.F32)


def _narrow(twin: Twin) -> DType:
    """Return the tuned weights' own type if it has 16 bits, else float32."""
    return twin.tensor.dtype if twin.tensor.dtype in _SIXTEEN else DType.F32


def _stored(twin: Twin, parts: Sequence[_Part], dtype: DType) -> Update:
    rank = max(part.update.rank for part in parts)
    left = np.stack([np.pad(p.update.b, ((0, 0), (0, rank - p.update.rank))) for p in parts])
    right = np.stack([np.pad(p.update.a, ((0, rank - p.update.rank), (0, 0))) for p in parts])
    if twin.turned or twin.embedding:
        left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
    if not twin.stacked:
        left, right = left[0], right[0]
    b, a = stored(left, dtype), stored(right, dtype)
    kind = Kind.EXPERTS if twin.stacked else Kind.EMBEDDING if twin.embedding else Kind.LINEAR
    return Update(twin.modules[0], a, b, 1.0, kind)


def as_stored(twin: Twin, pair: Update) -> list[LowRank]:
    """Return the rounded updates in the orientation of the stored matrices."""
    return [u.turned if twin.turned or twin.embedding else u for u in updates(pair)]


def _of_output(pair: Update, module: str) -> Update:
    """Return an embedding's update as that of the output which shares its table."""
    return Update(module, turned(pair.b), turned(pair.a), pair.scale)


def _key(seed: int, name: str, place: int) -> Key:
    digest = hashlib.blake2b(json.dumps([seed, name, place]).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
