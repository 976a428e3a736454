"""Bases whose files hold q, k, v or gate, up of experts as one tensor."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit import factors
from adapterkit.architectures.table import Architecture

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from adapterkit.architectures.sizes import Sizes
    from adapterkit.model import Update

_BLOCK = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Fusion:
    """One fused tensor and what it is made of, as name patterns."""

    gguf: str
    parts: tuple[str, ...]
    heights: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """The tensors that a family's converter writes, of a base whose own are not known.

    What the table has as another name only is not among them.
    """

    architecture: Architecture

    def __contains__(self, name: object) -> bool:
        """Tell whether a tensor, with `.weight`, is one of them."""
        matches = self.architecture.match_gguf(str(name).removesuffix(".weight"))
        return any(not match.rule.alias for match in matches)


def fuse_for(
    pairs: Iterable[Update], present: Container[str], sizes: Sizes
) -> tuple[list[Update], dict[str, tuple[str, ...]]]:
    """Fuse the parts whose base tensor exists only fused.

    Args:
        pairs: updates by llama.cpp tensor.
        present: names of the base's tensors, with `.weight`, or those that it would have.
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
    wanted: Callable[[str], bool],
) -> list[Update]:
    """Split updates of fused tensors that the family's table, or the adapter, knows only in parts.

    Args:
        architecture: the family.
        sizes: for the rows of each part; without them nothing is split.
        pairs: updates by llama.cpp tensor.
        wanted: tells whether the adapter has a module for a part.
    """
    found: list[Update] = []
    for pair in pairs:
        fusion, layer = _of_fused(pair.module), _layer(pair.module)
        parts = [part.replace("{i}", str(layer)) for part in fusion.parts] if fusion else []
        spelled = set(filter(wanted, parts))
        whole = bool(architecture.match_gguf(pair.module))
        if fusion is None or sizes is None or (whole and not spelled):
            found.append(pair)
            continue
        start = 0
        for name, height in zip(parts, fusion.heights, strict=True):
            stop = start + sizes.value(height, layer)
            piece = factors.slice_rows(pair, start, stop)
            # What nobody spells is there for the rows between.
            if not whole or name in spelled or piece.b.numpy().any():
                found.append(factors.renamed(piece, name))
            start = stop
    return found


def whole_of(architecture: Architecture, tensor: str) -> str | None:
    """Return the tensor that llama.cpp has in place of a part of it; both as name patterns."""
    written = Written(architecture)
    if _first(tensor) in written:
        return None
    found = (fusion.gguf for fusion in _fusions() if tensor in fusion.parts)
    return next((name for name in found if _first(name) in written), None)


def _first(pattern: str) -> str:
    return f"{pattern.replace('{i}', '0')}.weight"


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
