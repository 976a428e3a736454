"""A case: two commands, and what is promised of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from measure import Run

BUILD = Path("build/bench")
BIN = Path(sys.executable).parent
KIT = str(BIN / "adapterkit")
LAYERS, TARGETS = 32, 7  # of the adapter in the shape of Llama 8B


@dataclass(frozen=True)
class Case:
    """Ours, the peer's, and what is promised.

    Attributes:
        title: what is compared.
        ours: the command.
        peer: the command that it is compared with; None without one.
        promises: name of a figure in `FIGURES` -> the largest, or smallest, that it may be.
        fresh: outputs, removed before each run.
        rounds: how many runs are enough where the peer takes minutes.
        modules: of ours for each of the peer's.
    """

    title: str
    ours: Sequence[str]
    peer: Sequence[str] | None = None
    promises: dict[str, float] = field(default_factory=dict)
    fresh: Sequence[Path] = ()
    rounds: int | None = None
    modules: int = 1


# Name -> how it is computed, and whether more of it is better.
FIGURES: dict[str, tuple[Callable[[Case, Run, Run | None], float], bool]] = {
    "seconds": (lambda _, ours, __: ours.wall, False),
    "CPU seconds": (lambda _, ours, __: ours.cpu, False),
    "peak MiB": (lambda _, ours, __: ours.peak, False),
    "times faster": (lambda _, ours, peer: peer.wall / ours.wall if peer else 0.0, True),
    "times the peer's time": (lambda _, ours, peer: ours.wall / peer.wall if peer else 9e9, False),
    "times less CPU for a module": (
        lambda case, ours, peer: peer.cpu / (ours.cpu / case.modules) if peer else 0.0,
        True,
    ),
}


def kept(case: Case, ours: Run, peer: Run | None) -> dict[str, tuple[float, bool]]:
    """Return each promise's figure and whether it holds."""
    found: dict[str, tuple[float, bool]] = {}
    for name, promised in case.promises.items():
        measured, more = FIGURES[name]
        figure = measured(case, ours, peer)
        found[name] = figure, figure >= promised if more else figure <= promised
    return found
