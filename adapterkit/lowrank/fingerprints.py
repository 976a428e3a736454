"""A seeded sketch of updates: 1,024 numbers whose inner products are those of the updates.

With Ω (out, p) and Ψ (in, p) of random signs, S = Ωᵀ ΔW Ψ / p is p x p and, on average over the
signs, ⟨S₁, S₂⟩ = ⟨ΔW₁, ΔW₂⟩. Of many modules the sketches are added, each under a sign pattern of
its name, so that modules do not mix: one inner product is then right to about 1/p of the norms
(random projections: Johnson and Lindenstrauss 1984; with signs: Achlioptas 2003). It is linear in
ΔW, so a distance is right to a few hundredths of itself, however small it is.
"""

from __future__ import annotations

import hashlib
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from adapterkit.lowrank.products import Array, LowRank

# Sketches of different versions cannot be compared.
VERSION = 2
WIDTH = 32
SIZE = WIDTH * WIDTH
# Numbers that stand for one module alone, whatever its name.
BRIEF = 16
# The error of a cosine between two unrelated adapters of many modules, one standard deviation.
COSINE_ERROR = 1 / WIDTH

# Squared norms between this and its inverse leave float32 room for the numbers and their sums.
_SMALL = 1e-30

_OUT, _IN = "out", "in"

Narrow: TypeAlias = NDArray[np.float32]


class _Signs:
    """Rows of random signs that begin alike whatever their number: more of them change none."""

    def __init__(self) -> None:
        self._known: dict[str, Narrow] = {}
        self._lock = threading.Lock()

    def rows(self, side: str, count: int) -> Narrow:
        """Return (count, p)."""
        with self._lock:
            known = self._known.get(side)
            if known is None or len(known) < count:
                drawn = _drawn((side,), count, WIDTH).astype(np.float32)
                known = self._known[side] = drawn
        return known[:count]


_SIGNS = _Signs()


def sketch(update: LowRank) -> Array:
    """Return Ωᵀ ΔW Ψ / p of one update (p, p), or of each of a stack (E, p, p).

    Rows and columns of zeros at the end of ΔW, such as those of a grown vocabulary, change nothing.
    Sums are of float32, right to 1e-6 of the norm: a sketch is stored in no more.
    """
    out, inputs = update.shape
    b, a = _narrow(update.b), _narrow(update.a)
    left = (_SIGNS.rows(_OUT, out).T @ b).astype(np.float64)
    right = (a @ _SIGNS.rows(_IN, inputs)).astype(np.float64)
    return left @ right / WIDTH


def _narrow(matrix: Array) -> Narrow | Array:
    """Return a matrix in float32, unless its numbers are no such numbers."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = matrix.astype(np.float32)
        squared = np.vdot(narrow, narrow)
    return narrow if _SMALL < squared < 1 / _SMALL else matrix


@lru_cache(maxsize=4096)
def pattern(name: str) -> Array:
    """Return the signs (p, p) under which the sketch of a module is added."""
    return _drawn(("module", name), WIDTH, WIDTH)


def brief(whole: Array) -> Array:
    """Return 16 numbers that stand for a sketch (p, p): sums of 64 of its entries with signs."""
    signs = _drawn(("brief",), WIDTH, WIDTH)
    return np.asarray((whole * signs).reshape(BRIEF, -1).sum(axis=1), dtype=np.float64)


def _drawn(place: tuple[str, ...], rows: int, columns: int) -> Array:
    """Return signs that follow from the version and a place alone: the bits of SHAKE-256."""
    text = "/".join(("adapterkit", str(VERSION), *place))
    drawn = hashlib.shake_256(text.encode()).digest(-(-rows * columns // 8))
    bits = np.unpackbits(np.frombuffer(drawn, dtype=np.uint8), count=rows * columns)
    return bits.reshape(rows, columns).astype(np.float64) * 2 - 1
