"""Bases whose files hold q, k, v or gate, up of experts as one tensor."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit import factors

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from adapterkit.architectures.sizes import Sizes
    from adapterkit.architectures.table import Architecture
    from adapterkit.model import Update

_BLOCK = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Fusion:
    """One fused tensor and what it is made of, as name patterns."""

    gguf: str
    parts: tuple[str, ...]
    heights: tuple[str, ...]


def fuse_for(
    pairs: Iterable[Update], present: Container[str], sizes: Sizes
) -> tuple[list[Update], dict[str, tuple[str, ...]]]:
    """Fuse the parts whose base tensor exists only fused.

    Args:
        pairs: updates by llama.cpp tensor.
        present: names of the base's tensors, with `.weight`.
        sizes: for the rows of parts that are not adapted.

    Returns:
        The updates, and fused tensor -> the parts that went into it.
    """
    waiting: dict[str, dict[str, Update]] = {}
    plans: dict[str, tuple[Fusion, int]] = {}
    ready: list[Update] = []
    for pair in pairs:
        plan = _plan(pair.module, present)
        if plan is None:
            ready.append(pair)
        else:
            fused = plan[0].gguf.replace("{i}", str(plan[1]))
            plans[fused] = plan
            waiting.setdefault(fused, {})[pair.module] = pair
    for fused, parts in waiting.items():
        fusion, layer = plans[fused]
        names = [part.replace("{i}", str(layer)) for part in fusion.parts]
        heights = [
            parts[name].shape[-2] if name in parts else sizes.value(height, layer)
            for name, height in zip(names, fusion.heights, strict=True)
        ]
        ready.append(factors.fuse_rows([parts.get(name) for name in names], heights, fused))
    return ready, {fused: tuple(parts) for fused, parts in waiting.items()}


def split_fused(
    architecture: Architecture,
    sizes: Sizes | None,
    pairs: Iterable[Update],
    spelled: Container[tuple[str, int | None]] = (),
) -> list[Update]:
    """Split updates of fused tensors that the family's table knows only in parts.

    Args:
        architecture: the family.
        sizes: for the rows of each part; without them nothing is split.
        pairs: updates by llama.cpp tensor.
        spelled: rules and layers by which parts are wanted although the table has the whole.
    """
    found: list[Update] = []
    for pair in pairs:
        fusion = _of_fused(pair.module)
        wanted: set[str] | None = None
        if fusion and architecture.match_gguf(pair.module):
            names = (part.replace("{i}", str(_layer(pair.module))) for part in fusion.parts)
            wanted = {name for name in names if _is_spelled(architecture, name, spelled)}
            fusion = fusion if wanted else None
        if fusion is None or sizes is None:
            found.append(pair)
            continue
        layer = _layer(pair.module)
        start = 0
        for part, height in zip(fusion.parts, fusion.heights, strict=True):
            stop = start + sizes.value(height, layer)
            name = part.replace("{i}", str(layer))
            piece = factors.slice_rows(pair, start, stop)
            # What nobody spells is there for the rows between.
            if wanted is None or name in wanted or piece.b.numpy().any():
                found.append(factors.renamed(piece, name))
            start = stop
    return found


def _is_spelled(
    architecture: Architecture, tensor: str, spelled: Container[tuple[str, int | None]]
) -> bool:
    matches = architecture.match_gguf(tensor)
    return any((match.rule.hf, match.layer) in spelled for match in matches)


def whole_of(architecture: Architecture, tensor: str) -> str | None:
    """Return the tensor that llama.cpp always has in place of a part of it; name patterns."""
    found = (fusion.gguf for fusion in _fusions() if tensor in fusion.parts)
    return next((name for name in found if name in architecture.fused), None)


def _plan(name: str, present: Container[str]) -> tuple[Fusion, int] | None:
    layer = _layer(name)
    if layer is None or f"{name}.weight" in present:
        return None
    pattern = _BLOCK.sub("blk.{i}.", name)
    for fusion in _fusions():
        fused = fusion.gguf.replace("{i}", str(layer))
        if pattern in fusion.parts and f"{fused}.weight" in present:
            return fusion, layer
    return None


def _of_fused(name: str) -> Fusion | None:
    pattern = _BLOCK.sub("blk.{i}.", name)
    return next((fusion for fusion in _fusions() if fusion.gguf == pattern), None)


def _layer(name: str) -> int | None:
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


@cache
def _fusions() -> tuple[Fusion, ...]:
    text = (Path(__file__).parent / "fusions.toml").read_text(encoding="utf-8")
    return tuple(
        Fusion(row["gguf"], tuple(row["parts"]), tuple(row["heights"]))
        for row in tomllib.loads(text)["fusion"]
    )
