"""Where an adapter stands in a bank of others, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where an adapter stands among those of a bank, in one statistic of one family.

    Attributes:
        family: module name with every number as `*`.
        statistic: one of `STATISTICS`.
        value: mean over the family's updates.
        members: adapters of the bank that have this family.
        mean: over them; None without any.
        deviation: sample standard deviation; None for fewer than two.
        z: (value - mean) / deviation; None without a spread.
        percentile: share of them that lie below, ties counted half, in percent.
    """

    family: str
    statistic: str
    value: float
    members: int
    mean: float | None
    deviation: float | None
    z: float | None
    percentile: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceAudit:
    """An adapter against a bank.

    Attributes:
        path: the bank.
        members: adapters in it.
        other_bases: how many of them were trained on another base model, as recorded.
        standings: one row for each family and statistic.
    """

    path: str
    members: int
    other_bases: int
    standings: tuple[Standing, ...]
