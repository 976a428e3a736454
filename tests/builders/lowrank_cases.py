"""Updates of every kind that there is, with the dense matrices that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterkit.lowrank.products import LowRank, stacked

Array = np.ndarray[Any, np.dtype[np.float64]]


def update(seed: int, out: int = 40, inputs: int = 30, rank: int = 5) -> LowRank:
    """Return a random update."""
    rng = np.random.default_rng(seed)
    return LowRank(rng.standard_normal((out, rank)), rng.standard_normal((rank, inputs)))


@dataclass(frozen=True, slots=True)
class Case:
    """One update.

    Attributes:
        name: what is special.
        update: its factors.
    """

    name: str
    update: LowRank

    @property
    def dense(self) -> Array:
        """B · A, its columns and rows summed in extended precision."""
        wide = self.update.b.astype(np.longdouble) @ self.update.a.astype(np.longdouble)
        return wide.astype(np.float64)

    @property
    def parts(self) -> float:
        """‖B‖ · ‖A‖, of which what cancels leaves rounding."""
        return float(np.linalg.norm(self.update.b) * np.linalg.norm(self.update.a))

    def __str__(self) -> str:
        return self.name


def gaussian(seed: int, out: int = 60, inputs: int = 45, rank: int = 6) -> LowRank:
    random = np.random.default_rng(seed)
    return LowRank(random.standard_normal((out, rank)), random.standard_normal((rank, inputs)))


def conditioned(seed: int, ratio: float) -> LowRank:
    """Factors of which both have that ratio of singular values, and unit columns have too."""
    one = gaussian(seed)
    random = np.random.default_rng(seed + 100)
    shares = np.geomspace(1, 1 / ratio, 6)
    mixes = [np.linalg.qr(random.standard_normal((6, 6)))[0] for _ in range(4)]
    return LowRank(
        np.linalg.qr(one.b)[0] @ mixes[0] * shares @ mixes[1],
        mixes[2] * shares @ mixes[3] @ np.linalg.qr(one.a.T)[0].T,
    )


def cancelling(seed: int, share: float) -> LowRank:
    """Two updates that are nearly equal, one taken from the other."""
    one, other = gaussian(seed), gaussian(seed + 1)
    near = LowRank(one.b, one.a + share * other.a)
    return stacked([one, near], [1.0, -1.0])


def deficient(seed: int) -> LowRank:
    one = gaussian(seed)
    b, a = one.b.copy(), one.a.copy()
    b[:, 4] = b[:, 0] - b[:, 1]
    b[:, 5] = 0
    a[3] = 2 * a[2]
    return LowRank(b, a)


def lopsided(seed: int) -> LowRank:
    one = gaussian(seed)
    lengths = np.geomspace(1e-9, 1e9, 6)
    return LowRank(one.b * lengths, one.a / lengths[:, None])


CASES = (
    Case("random", gaussian(0)),
    Case("tall", gaussian(1, 3000, 40, 4)),
    Case("wide", gaussian(2, 40, 3000, 4)),
    *(Case(f"condition-{ratio:g}", conditioned(3, ratio)) for ratio in (10, 300, 3e3, 1e6)),
    *(Case(f"cancelling-{share:g}", cancelling(4, share)) for share in (1e-2, 1e-5, 1e-8)),
    Case("rank-deficient", deficient(5)),
    Case("lopsided", lopsided(6)),
    Case("zero", LowRank(np.zeros((20, 3)), gaussian(7, 20, 30, 3).a)),
    Case("rank-0", LowRank(np.zeros((5, 0)), np.zeros((0, 4)))),
    Case("1x1", LowRank(np.array([[-2.0]]), np.array([[3.0]]))),
    Case("rank-above-the-sides", gaussian(8, 5, 4, 9)),
    Case("one-row", gaussian(9, 1, 30, 4)),
)
