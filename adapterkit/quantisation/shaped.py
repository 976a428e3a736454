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
from adapterkit.quantisation.grids import scales_only

if TYPE_CHECKING:
    from adapterkit.dtype import DType
    from adapterkit.quantisation.grids import Grid

Array = np.ndarray[Any, np.dtype[Any]]

ROUNDS = 3
_SINGULAR = 1e-5
# Rows whose numbers in double precision stay in the cache.
_FEW = 32


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
        found = np.empty(len(error))
        for start in range(0, len(error), _FEW):
            rows = error[start : start + _FEW].astype(np.float64)
            own = np.square(rows @ self.directions.T).sum(1)
            found[start : start + _FEW] = own + np.square(rows, out=rows) @ self.weights
        return found

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
    at = _better_blocks(x, starts, dtype, shape.weights)
    sums = first_pass(x, at, shape)
    for _ in range(rounds):
        _refit_scales(x, at, shape, sums)
        _descend(x, at, shape, sums)
    best = at.packed()
    least = _left(best, dtype, wanted, shape)
    for start in starts:
        error = _left(start, dtype, wanted, shape)
        worse = error < least
        best[worse], least[worse] = start[worse], error[worse]
    return best


def _left(data: Array, dtype: DType, wanted: Array, shape: Shape) -> Array:
    """Return the sum that counts, of each row."""
    return shape.objective(dequantise(data, dtype, wanted.shape) - wanted)


def _better_blocks(x: Array, starts: tuple[Array, ...], dtype: DType, weights: Array) -> Grid:
    """Return a grid of which every block has the scales that fit `x` best, without levels."""
    best, *others = (scales_only(start, dtype) for start in starts)
    if not others:
        return best
    least = _misfits(x, best, weights)
    for other in others:
        errors = _misfits(x, other, weights)
        better = errors < least
        best.take(other, better)
        np.copyto(least, errors, where=better)
    return best


def _misfits(x: Array, at: Grid, weights: Array) -> Array:
    """Return the weighted squares of nearest rounding, (blocks, rows)."""
    width = at.layout.part
    found = np.zeros(at.d.shape, np.float32)
    weights = weights.astype(np.float32)
    of_block = len(x) // width // len(found)
    for part in range(len(x) // width):
        columns = slice(part * width, (part + 1) * width)
        scaled = _scaled(x[columns], at, part)
        errors = at.nearest(scaled.copy())
        errors -= scaled
        errors *= errors
        squares = weights[columns] @ errors
        squares *= np.square(at.scales(part))
        found[part // of_block] += squares
    return found


def _inverse(scales: Array) -> Array:
    """Return 1 / d, 0 where d is 0: all levels are the same value there."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def _scaled(values: Array, at: Grid, part: int) -> Array:
    """Return the values of a part as levels, not yet whole numbers."""
    offset = at.offsets(part)
    return (values if offset is None else values - offset) * _inverse(at.scales(part))


def _errors(x: Array, at: Grid, part: int, columns: slice) -> Array:
    """Return what the levels of a part stand for, less what is wanted."""
    errors = at.levels[columns] * at.scales(part)
    if (offset := at.offsets(part)) is not None:
        errors += offset
    errors -= x[columns]
    return errors


def first_pass(x: Array, at: Grid, shape: Shape) -> Array:
    """Round column by column with feedback; return G e, (k, rows)."""
    g, v = shape.directions.astype(np.float32), shape.feedback
    sums = np.zeros((len(g), x.shape[1]), np.float32)
    width = at.layout.part
    # In a part all errors are counted in its scales, as levels are.
    errors = np.empty((width, x.shape[1]), np.float32)
    for part in range(len(x) // width):
        columns = slice(part * width, (part + 1) * width)
        wanted = _scaled(x[columns], at, part)
        inner = v[columns] @ g[:, columns]
        pull = (v[columns] @ sums) * _inverse(at.scales(part))
        levels = at.levels[columns]
        np.subtract(wanted, pull, out=levels)
        for i in range(width):
            if i:
                levels[i] -= inner[i, :i] @ errors[:i]
            at.nearest(levels[i])
            np.subtract(levels[i], wanted[i], out=errors[i])
        sums += g[:, columns] @ _errors(x, at, part, columns)
    return sums


def _descend(x: Array, at: Grid, shape: Shape, sums: Array) -> None:
    """Move every level to where the sum is smallest, the others being as they are.

    The sum is a parabola in each error: best is the present one less the slope over the curve, and
    the level next to that, which no other level is better than.
    """
    g, d = shape.directions.astype(np.float32), shape.weights.astype(np.float32)
    width = at.layout.part
    moves = np.empty((width, x.shape[1]), np.float32)
    for part in range(len(x) // width):
        columns = slice(part * width, (part + 1) * width)
        inner = g[:, columns].T @ g[:, columns]
        curve = d[columns, None] + inner.diagonal()[:, None]
        inner /= curve
        step = d[columns, None] * _errors(x, at, part, columns)
        step += g[:, columns].T @ sums
        step /= curve
        step *= _inverse(at.scales(part))
        levels = at.levels[columns]
        wanted = np.subtract(levels, step, out=step)
        for i in range(width):
            if i:
                wanted[i] -= inner[i, :i] @ moves[:i]
            at.nearest(wanted[i])
            np.subtract(wanted[i], levels[i], out=moves[i])
        levels[:] = wanted
        moves *= at.scales(part)
        sums += g[:, columns] @ moves


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
    return p, np.ones((len(p), 1), np.float32)


def _half(values: Array) -> Array:
    """Return values as half precision has them."""
    return values.astype(np.float16).astype(np.float32)
