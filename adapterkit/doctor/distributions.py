"""Next-token distributions as servers tell them, and how far they are from what they should be.

A server tells the most likely tokens alone. All others count as one: KL*(p ‖ q) is the sum over
the tokens told of p log(p/q), and that of the rest. It is never more than the true divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

# Natural logarithms of probabilities by token: its number, or its text where numbers are not told.
Distribution: TypeAlias = Mapping[int | str, float]

# Strengths at which the expected effect is computed: the effect is far from linear in them. Where
# the first of them explain what is seen, the others are not needed.
NEAR = (0.0, 0.9, 1.0, 1.1)
FAR = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.25, 1.5, 2.0, 4.0)
# What is explained: the share of the effect that may be left.
_EXPLAINED = 0.01
_TINY = 1e-12

# What a base and an adapter of a strength should answer, a distribution for each prompt.
Expected: TypeAlias = Callable[[float], Sequence[Distribution]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How what a server answers compares with what it should; all in nats, means over prompts.

    Attributes:
        base: divergence of the answers without the adapter from the base's.
        effect: divergence of the answers with it from those without.
        expected: what the effect should be.
        distance: divergence of the answers with it from the nearest strength's.
        strength: the nearest strength, between those computed.
    """

    base: float
    effect: float
    expected: float
    distance: float
    strength: float

    @property
    def unexplained(self) -> float:
        """The share of the effect that the adapter has at no strength."""
        return max(self.distance - 2 * self.base, 0.0) / max(self.effect, _TINY)


def divergence(told: Distribution, reference: Distribution) -> float:
    """Return KL*(told ‖ reference), in nats.

    A token that the reference does not tell is as likely there as the least likely that it tells.
    """
    floor = min(reference.values())
    total = p_rest = q_rest = 0.0
    for token, logarithm in told.items():
        p, other = math.exp(logarithm), reference.get(token, floor)
        total += p * (logarithm - other)
        p_rest += p
        q_rest += math.exp(other)
    p_rest, q_rest = max(1 - p_rest, _TINY), max(1 - q_rest, _TINY)
    return max(total + p_rest * math.log(p_rest / q_rest), 0.0)


def mean_divergence(told: Sequence[Distribution], reference: Sequence[Distribution]) -> float:
    """Return the mean KL* over the prompts."""
    return fmean(divergence(p, q) for p, q in zip(told, reference, strict=True))


def measured(
    off: Sequence[Distribution], on: Sequence[Distribution], expected: Expected
) -> Measured:
    """Compare the answers without and with an adapter with what they should be."""
    known = {strength: expected(strength) for strength in NEAR}
    distances = {s: mean_divergence(on, answers) for s, answers in known.items()}
    base = mean_divergence(off, known[0.0])
    effect = mean_divergence(on, off)
    if distances[1.0] > min(distances.values()) or distances[1.0] > 2 * base + _EXPLAINED * effect:
        distances |= {s: mean_divergence(on, expected(s)) for s in FAR}
    nearest = min(distances, key=lambda strength: distances[strength])
    count = min(map(len, on))
    with_it, without = ([_first(each, count) for each in known[s]] for s in (1.0, 0.0))
    return Measured(
        base=base,
        effect=effect,
        expected=mean_divergence(with_it, without),
        distance=distances[nearest],
        strength=_between(distances, nearest),
    )


def _first(whole: Distribution, count: int) -> Distribution:
    ranked = sorted(whole, key=lambda token: whole[token], reverse=True)
    return {token: whole[token] for token in ranked[:count]}


def _between(distances: Mapping[float, float], nearest: float) -> float:
    """Return where a parabola through the nearest strength and its neighbours is lowest."""
    known = sorted(distances)
    place = known.index(nearest)
    if not 0 < place < len(known) - 1:
        return nearest
    x0, x1, x2 = known[place - 1 : place + 2]
    y0, y1, y2 = (distances[x] for x in (x0, x1, x2))
    if y1 <= _EXPLAINED * min(y0, y2):
        return nearest
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    if bend <= 0:
        return nearest
    lowest = (x0 + x1) / 2 - left / (2 * bend)
    return min(max(lowest, x0), x2)
