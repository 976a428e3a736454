"""Rounding whose error stays out of the directions that count, on the grid that is there.

Of one row x it makes small  Σ_j D_j e_j² + ‖G e‖²,  e = q - x,  with k directions G and a weight D
of everything else. GPTQ (arXiv 2210.17323) does so for any Hessian H, with its Cholesky factor; for
H = diag(D) + GᵀG that factor is never needed: what all later columns can still make good, from
column j on, is

    y_j = x_j - v_jᵀ s,   v_j = P_j g_j / D_j,   P_j = (I + Σ_{i≥j} g_i g_iᵀ / D_i)⁻¹,

where s = Σ_{i<j} g_i e_i is all that there is to remember: k numbers a row. P follows from the last
column back by Sherman and Morrison's formula. After this pass, rounds of least squares for the
scales of a block and of descent in the levels, one column at a time, only make the sum smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.quantisation import dequantise
from adapterkit.quantisation.grids import grid

if TYPE_CHECKING:
    from adapterkit.dtype import DType
    from adapterkit.quantisation.grids import Grid

Array = np.ndarray[Any, np.dtype[Any]]

ROUNDS = 3
# Columns whose feedback is one matrix product; a multiple of every part.
_RUN = 32
_SINGULAR = 1e-5


@dataclass(frozen=True)
class Shape:
    """Which errors count.

    Attributes:
        directions: G, (k, columns).
        weights: D, (columns,), all greater than 0.
    """

    directions: Array
    weights: Array

    def objective(self, error: Array) -> Array:
        """Return the sum that rounding makes small, of each row of (rows, columns)."""
        return np.square(error) @ self.weights + np.square(error @ self.directions.T).sum(1)

    @cached_property
    def feedback(self) -> Array:
        """All v_j, (columns, k), float32."""
        g, d = self.directions.T.astype(np.float64), self.weights.astype(np.float64)
        p = np.eye(g.shape[1])
        found = np.empty(g.shape, np.float32)
        for j in range(len(g) - 1, -1, -1):
            pg = p @ g[j]
            rest = d[j] + g[j] @ pg
            p -= np.outer(pg, pg / rest)
            found[j] = pg / rest  # P g / D after the update of P
        return found


def shaped(
    wanted: Array, starts: tuple[Array, ...], dtype: DType, shape: Shape, rounds: int = ROUNDS
) -> Array:
    """Return rows of a block type whose error matters least, never more than that of any start.

    Args:
        wanted: (rows, columns), float32.
        starts: packed rows, (rows, bytes) each, whose scales are tried: those of the base, if it
            has the type, and what nearest rounding makes.
        dtype: one of `LAYOUTS`.
        shape: which errors count.
        rounds: of scales and levels after the first pass.
    """
    x = np.ascontiguousarray(wanted.T)
    at = grid(_better_blocks(x, starts, dtype, shape.weights), dtype)
    sums = first_pass(x, at, shape)
    for _ in range(rounds):
        _refit_scales(x, at, shape, sums)
        _descend(x, at, shape, sums)
    best = at.packed()
    least = shape.objective(_decoded(best, dtype, wanted.shape) - wanted)
    for start in starts:
        error = shape.objective(_decoded(start, dtype, wanted.shape) - wanted)
        worse = error < least
        best[worse], least[worse] = start[worse], error[worse]
    return best


def _decoded(data: Array, dtype: DType, shape: tuple[int, ...]) -> Array:
    return dequantise(data, dtype, shape)


def _better_blocks(x: Array, starts: tuple[Array, ...], dtype: DType, weights: Array) -> Array:
    """Return packed rows of which every block has the scales that fit `x` best."""
    best: Array | None = None
    least: Array | None = None
    for start in starts:
        at = grid(start, dtype)
        for part, rows in enumerate(_parts(at, x)):
            np.copyto(at.levels[rows], _rounded(x[rows], at, part))
        squares = np.square(at.values() - x) * weights[:, None]
        errors = squares.reshape(len(at.d), -1, x.shape[1]).sum(1).T
        raw = at.packed().reshape(at.raw.shape)
        if best is None or least is None:
            best, least = raw, errors
            continue
        better = errors < least
        best[better], least[better] = raw[better], errors[better]
    assert best is not None  # noqa: S101  (there is a start)
    return best.reshape(x.shape[1], -1)


def _parts(at: Grid, x: Array) -> list[slice]:
    width = at.layout.part
    return [slice(start, start + width) for start in range(0, len(x), width)]


def _inverse(scales: Array) -> Array:
    """Return 1 / d, 0 where d is 0: all levels are the same value there."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def _rounded(x: Array, at: Grid, part: int) -> Array:
    offset = at.offsets(part)
    return at.nearest((x if offset is None else x - offset) * _inverse(at.scales(part)))


class _Part:
    """The scales of a part of the columns, in the order in which a pass comes to them."""

    def __init__(self, at: Grid, part: int) -> None:
        self.at = at
        self.scale, self.offset = at.scales(part), at.offsets(part)
        self.inverse = _inverse(self.scale)

    def levels(self, wanted: Array) -> Array:
        """Return the levels next to values."""
        shifted = wanted if self.offset is None else wanted - self.offset
        return self.at.nearest(shifted * self.inverse)

    def values(self, levels: Array) -> Array:
        """Return what levels stand for."""
        values = levels * self.scale
        return values if self.offset is None else np.add(values, self.offset, out=values)


def _parts_of(at: Grid, begin: int) -> list[_Part]:
    width = at.layout.part
    return [_Part(at, start // width) for start in range(begin, begin + _RUN, width)]


def first_pass(x: Array, at: Grid, shape: Shape) -> Array:
    """Round column by column with feedback; return G e, (k, rows)."""
    g, v = shape.directions.astype(np.float32), shape.feedback
    sums = np.zeros((len(g), x.shape[1]), np.float32)
    errors = np.empty((_RUN, x.shape[1]), np.float32)
    for begin in range(0, len(x), _RUN):
        run, parts = slice(begin, begin + _RUN), _parts_of(at, begin)
        wanted = x[run] - v[run] @ sums
        within = v[run] @ g[:, run]
        for i in range(_RUN):
            j = begin + i
            part = parts[i // at.layout.part]
            y = wanted[i] - within[i, :i] @ errors[:i] if i else wanted[i]
            at.levels[j] = levels = part.levels(y)
            np.subtract(part.values(levels), x[j], out=errors[i])
        sums += g[:, run] @ errors
    return sums


def _descend(x: Array, at: Grid, shape: Shape, sums: Array) -> None:
    """Move every level to where the sum is smallest, the others being as they are."""
    g, d = shape.directions.astype(np.float32), shape.weights.astype(np.float32)
    moves = np.empty((_RUN, x.shape[1]), np.float32)
    for begin in range(0, len(x), _RUN):
        run, parts = slice(begin, begin + _RUN), _parts_of(at, begin)
        inner = g[:, run].T @ g[:, run]
        pull = g[:, run].T @ sums
        for i in range(_RUN):
            j = begin + i
            part = parts[i // at.layout.part]
            if i:
                pull[i] += inner[i, :i] @ moves[:i]
            curve = d[j] + inner[i, i]
            values = part.values(at.levels[j])
            error = values - x[j]
            # The best error is the present one less the slope over the curve.
            step = (d[j] * error + pull[i]) / curve
            levels = part.levels(values - step)
            move = part.values(levels)
            move -= values
            # f changes by curve · move · (move + 2 step): not below zero is not better.
            better = move * (move + 2 * step) < 0
            move *= better
            moves[i] = move
            np.copyto(at.levels[j], levels, where=better)
        sums += g[:, run] @ moves


def _refit_scales(x: Array, at: Grid, shape: Shape, sums: Array) -> None:
    """Set d and m of one block after the other by least squares, rounded to half precision."""
    width = len(x) // len(at.d)
    for block in range(len(at.d)):
        columns = slice(block * width, (block + 1) * width)
        _refit(x[columns], at, block, shape, columns, sums)


def _refit(x: Array, at: Grid, block: int, shape: Shape, columns: slice, sums: Array) -> None:
    g = shape.directions[:, columns].astype(np.float32)
    weights = shape.weights[columns].astype(np.float32)
    p, q = _basis(at, block, columns)
    d, m = at.d[block], None if at.m is None else at.m[block]
    error = p * d - x
    if q is not None and m is not None:
        error += q * m
    gp = g @ p
    pp = weights @ (p * p) + np.square(gp).sum(0)
    pe = weights @ (p * error) + (gp * sums).sum(0)
    if q is None or m is None:
        new = _half(d - pe * _inverse(pp))
        step = new - d
        better = step * (step * pp + 2 * pe) < 0
        sums += gp * (step * better)
        np.copyto(d, new, where=better)
        return
    gq = g @ q
    qq = weights @ (q * q) + np.square(gq).sum(0)
    pq = weights @ (p * q) + (gp * gq).sum(0)
    qe = weights @ (q * error) + (gq * sums).sum(0)
    rest = pp * qq - pq * pq
    solved = np.where(rest > _SINGULAR * pp * qq, rest, np.inf)
    new = _half(d - (pe * qq - qe * pq) / solved)
    step = new - d
    # m is solved for anew, with d as half precision has it.
    moved = _half(m - (qe + pq * step) * _inverse(qq))
    shift = moved - m
    change = step * (step * pp + 2 * (pe + shift * pq)) + shift * (shift * qq + 2 * qe)
    better = change < 0
    sums += gp * (step * better) + gq * (shift * better)
    np.copyto(d, new, where=better)
    np.copyto(m, moved, where=better)


def _basis(at: Grid, block: int, columns: slice) -> tuple[Array, Array | None]:
    """Return what d and m are multiplied with in a block, (columns, rows)."""
    p = at.levels[columns]
    width = len(p) // at.layout.part
    parts = slice(block * width, (block + 1) * width)
    if at.s is not None:
        p = p * np.repeat(at.s[parts], at.layout.part, axis=0)
    if at.m is None:
        return p, None
    if at.t is not None:
        return p, np.repeat(at.t[parts], at.layout.part, axis=0)
    return p, np.ones_like(p)


def _half(values: Array) -> Array:
    """Return values as half precision has them."""
    return values.astype(np.float16).astype(np.float32)
