"""Which modules share their coefficients, by the rules of each implementation."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PACK_MODES = ("none", "all", "tiled", "structured")
_DIGITS = re.compile(r"\d+")


def layer_index(name: str) -> int:
    """Return the first dotted part that is a number, else the first run of digits, else -1."""
    for part in name.split("."):
        if part.isdecimal():
            return int(part)
    found = _DIGITS.search(name)
    return int(found[0]) if found else -1


def pack_groups(names: Sequence[str], mode: str, factor: int) -> dict[str, int]:
    """Return the tie group of every module, in the order of `names`, as the ANRGUSC pack has it.

    `tiled` cuts the modules, sorted by layer and then by name, into runs of `factor`; `structured`
    does so for each last name component apart. So modules inside a layer follow the alphabet.

    Args:
        names: dotted module names, in the order in which the model registers them.
        mode: one of `PACK_MODES`.
        factor: modules that share one vector; less than 1 counts as 1.
    """
    size = max(1, factor)
    if mode == "none":
        return {name: place for place, name in enumerate(names)}
    if mode == "all":
        return dict.fromkeys(names, 0)
    buckets: dict[str, list[str]] = {}
    for name in names:
        kind = name.rpartition(".")[2] if mode == "structured" else ""
        buckets.setdefault(kind, []).append(name)
    groups = _chunked([sorted(buckets[kind], key=_depth) for kind in sorted(buckets)], size)
    return {name: groups[name] for name in names}


def _depth(name: str) -> tuple[int, str]:
    return layer_index(name), name


def _chunked(buckets: Iterable[Sequence[str]], size: int) -> dict[str, int]:
    groups: dict[str, int] = {}
    first = 0
    for bucket in buckets:
        groups.update({name: first + place // size for place, name in enumerate(bucket)})
        first += -(-len(bucket) // size)
    return groups


def peft_group_count(modules: int, tying: float) -> int:
    """Return how many vectors PEFT keeps: round(n · (1 - tying)), halves to even, at least one."""
    return max(1, round(modules * (1.0 - tying)))


def peft_groups(modules: int, tying: float) -> list[int]:
    """Return the group of each module in registration order; the last takes the remainder."""
    count = peft_group_count(modules, tying)
    size = max(1, modules // count)
    return [min(place // size, count - 1) for place in range(modules)]


def partition(groups: Mapping[str, int]) -> frozenset[frozenset[str]]:
    """Return which modules are together, whatever the numbers of the groups."""
    members: dict[int, set[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, set()).add(name)
    return frozenset(frozenset(names) for names in members.values())
