"""The grids of ggml's block types: codes and scales out of packed rows, and back into them.

Every value of these types is d · p + m · q, with d and m in half precision for a whole block, and
p = s · level, q = t whole numbers that the block's bytes hold. Layouts are those of ggml-common.h.
Arrays run along the columns first, (columns, rows), so that one column of many rows is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from adapterkit.dtype import DType

Array = np.ndarray[Any, np.dtype[Any]]

# The levels of IQ4_NL, kvalues_iq4nl of ggml-common.h.
_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a block of one type holds what.

    Attributes:
        part: elements that share s and t.
        scale: byte of d, in half precision.
        offset: byte of m (of dmin, its negative factor, in K types); None where there is none.
        low: smallest level.
        high: largest level.
        unpack: (blocks, bytes) to levels less `low`, (blocks, elements), uint8.
        pack: writes such levels into (blocks, bytes).
        parts: (blocks, bytes) to s and t, (blocks, parts), where they are not 1.
        levels: all levels, in order, where they are not every whole number.
    """

    part: int
    scale: int
    offset: int | None
    low: int
    high: int
    unpack: Callable[[Array], Array]
    pack: Callable[[Array, Array], None]
    parts: Callable[[Array], tuple[Array, Array | None]] | None = None
    levels: tuple[int, ...] = ()


@dataclass(slots=True)
class Grid:
    """Rows of one type, taken apart: value = d · s · level + m · t.

    Attributes:
        layout: of the type.
        levels: (columns, rows), float32 whole numbers.
        d: (blocks, rows), float32 that half precision holds.
        m: the same, or None.
        s: (parts, rows), or None for 1.
        t: the same.
        raw: (rows, blocks, bytes), from which what has no field here is taken.
    """

    layout: Layout
    levels: Array
    d: Array
    m: Array | None
    s: Array | None
    t: Array | None
    raw: Array

    def scales(self, part: int) -> Array:
        """Return d · s of a part, (rows,)."""
        d = self.d[self._block(part)]
        return d if self.s is None else d * self.s[part]

    def offsets(self, part: int) -> Array | None:
        """Return m · t of a part, (rows,), or None where there is none."""
        if self.m is None:
            return None
        m = self.m[self._block(part)]
        return m if self.t is None else m * self.t[part]

    def _block(self, part: int) -> int:
        return part * len(self.d) * self.layout.part // len(self.levels)

    def nearest(self, wanted: Array) -> Array:
        """Return the levels next to `wanted`, in its memory."""
        layout = self.layout
        if layout.levels:
            # Whatever lies midway between two levels is a multiple of a half.
            halves = np.floor(np.clip(wanted, layout.low, layout.high) * 2)
            wanted[:] = _by_halves(layout)[(halves - 2 * layout.low).astype(np.int32)]
            return wanted
        np.rint(wanted, out=wanted)
        np.maximum(wanted, layout.low, out=wanted)
        return np.minimum(wanted, layout.high, out=wanted)

    def values(self) -> Array:
        """Return all values, (columns, rows)."""
        found: Array = self.levels.reshape(-1, self.layout.part, self.levels.shape[1]).copy()
        for part in range(len(found)):
            found[part] *= self.scales(part)
            if (offset := self.offsets(part)) is not None:
                found[part] += offset
        return found.reshape(self.levels.shape)

    def take(self, other: Grid, better: Array) -> None:
        """Take the scales of another grid for the same rows, where (blocks, rows) says so."""
        pairs = ((self.d, other.d), (self.m, other.m), (self.s, other.s), (self.t, other.t))
        for mine, its in pairs:
            if mine is not None and its is not None:
                times = len(mine) // len(better)
                np.copyto(mine, its, where=np.repeat(better, times, axis=0))
        self.raw[better.T] = other.raw[better.T]

    def _codes(self) -> Array:
        """Return the levels' numbers, (columns, rows), uint8."""
        layout, found = self.layout, np.empty(self.levels.shape, np.uint8)
        for start in range(0, len(found), layout.part):
            run = slice(start, start + layout.part)
            if layout.levels:
                found[run] = np.searchsorted(layout.levels, self.levels[run])
            else:
                found[run] = self.levels[run] - np.float32(layout.low)
        return found

    def packed(self) -> Array:
        """Return the rows as bytes, (rows, bytes)."""
        layout = self.layout
        rows, blocks, width = self.raw.shape
        raw = self.raw.copy().reshape(-1, width)
        codes = self._codes().T
        layout.pack(raw, np.ascontiguousarray(codes).reshape(rows * blocks, -1))
        _put(raw, layout.scale, self.d)
        if self.m is not None and layout.offset is not None:
            _put(raw, layout.offset, self.m)
        return raw.reshape(rows, -1)


def grid(data: Array, dtype: DType) -> Grid:
    """Take packed rows apart.

    Args:
        data: uint8, (rows, bytes).
        dtype: one of `LAYOUTS`.
    """
    found = scales_only(data, dtype)
    layout = found.layout
    codes = layout.unpack(found.raw.reshape(-1, dtype.block_bytes)).reshape(len(data), -1)
    levels = np.asarray(layout.levels, np.float32)[codes] if layout.levels else codes
    found.levels[:] = levels.T
    if not layout.levels:
        found.levels += np.float32(layout.low)
    return found


def scales_only(data: Array, dtype: DType) -> Grid:
    """Return the scales of packed rows, with room for levels that are still to be found."""
    layout = LAYOUTS[dtype]
    rows = len(data)
    raw = data.reshape(rows, -1, dtype.block_bytes).copy()
    blocks = raw.reshape(-1, dtype.block_bytes)
    s, t = layout.parts(blocks) if layout.parts else (None, None)
    return Grid(
        layout,
        np.empty((raw.shape[1] * dtype.block, rows), np.float32),
        _halves(blocks, layout.scale, rows),
        None if layout.offset is None else _halves(blocks, layout.offset, rows),
        None if s is None else _turned(s, rows),
        None if t is None else _turned(t, rows),
        raw,
    )


@cache
def _by_halves(layout: Layout) -> Array:
    """Return the level next to every multiple of a half, and to what is above up to the next."""
    known = np.asarray(layout.levels, np.float32)
    halves = np.arange(2 * layout.low, 2 * layout.high + 1) / 2
    return known[np.searchsorted((known[1:] + known[:-1]) / 2, halves, side="right")]


def _turned(values: Array, rows: int) -> Array:
    return np.ascontiguousarray(values.reshape(rows, -1).T, np.float32)


def _halves(blocks: Array, at: int, rows: int) -> Array:
    return _turned(np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2"), rows)


def _put(raw: Array, at: int, values: Array) -> None:
    halves = np.ascontiguousarray(values.T, "<f2").reshape(-1, 1)
    raw[:, at : at + 2] = halves.view(np.uint8)


def _nibbles(packed: Array) -> Array:
    """Return low nibbles, then high ones, of each run of bytes in the last axis."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _paired(codes: Array) -> Array:
    """Undo `_nibbles`."""
    half = codes.shape[-1] // 2
    return (codes[..., :half] & 15) | (codes[..., half:] & 15) << 4


def _bits(packed: Array) -> Array:
    """Return the bits of 4 bytes, (blocks, 32), the lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _four(at: int) -> tuple[Callable[[Array], Array], Callable[[Array, Array], None]]:
    """Return how 32 codes of 4 bits from byte `at` on are read and written."""

    def unpack(blocks: Array) -> Array:
        return _nibbles(blocks[:, at : at + 16])

    def pack(blocks: Array, codes: Array) -> None:
        blocks[:, at : at + 16] = _paired(codes)

    return unpack, pack


def _five(at: int) -> tuple[Callable[[Array], Array], Callable[[Array, Array], None]]:
    """Return how 32 codes of 5 bits are read and written: 4 bytes of high bits, then nibbles."""

    def unpack(blocks: Array) -> Array:
        return _nibbles(blocks[:, at + 4 : at + 20]) | _bits(blocks[:, at : at + 4]) << 4

    def pack(blocks: Array, codes: Array) -> None:
        blocks[:, at : at + 4] = np.packbits(codes >> 4, axis=-1, bitorder="little")
        blocks[:, at + 4 : at + 20] = _paired(codes)

    return unpack, pack


def _parts_k(blocks: Array) -> tuple[Array, Array]:
    """Return the scales and minima of 6 bits of Q4_K and Q5_K, minima negative."""
    q = blocks[:, 4:16]
    scales = np.concatenate([q[:, :4] & 63, (q[:, 8:] & 15) | (q[:, :4] >> 6) << 4], axis=1)
    minima = np.concatenate([q[:, 4:8] & 63, (q[:, 8:] >> 4) | (q[:, 4:8] >> 6) << 4], axis=1)
    return scales, -minima.astype(np.float32)


def _unpack_q4_k(blocks: Array) -> Array:
    return _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)


def _pack_q4_k(blocks: Array, codes: Array) -> None:
    blocks[:, 16:] = _paired(codes.reshape(-1, 4, 64)).reshape(-1, 128)


def _unpack_q5_k(blocks: Array) -> Array:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return (low | high << 4).reshape(-1, 256)


def _pack_q5_k(blocks: Array, codes: Array) -> None:
    high = codes.reshape(-1, 8, 32) >> 4 << np.arange(8, dtype=np.uint8)[:, None]
    blocks[:, 16:48] = np.bitwise_or.reduce(high, axis=1)
    blocks[:, 48:] = _paired(codes.reshape(-1, 4, 64)).reshape(-1, 128)


def _parts_q6_k(blocks: Array) -> tuple[Array, None]:
    return np.ascontiguousarray(blocks[:, 192:208]).view(np.int8), None


def _unpack_q6_k(blocks: Array) -> Array:
    # Of each half: quarters 0 and 1 are the low nibbles of 64 bytes, 2 and 3 the high ones.
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    return (low | high << 4).reshape(-1, 256)


def _pack_q6_k(blocks: Array, codes: Array) -> None:
    blocks[:, :128] = _paired(codes.reshape(-1, 2, 128)).reshape(-1, 128)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = codes.reshape(-1, 2, 4, 32) >> 4 << shifts
    blocks[:, 128:192] = np.bitwise_or.reduce(high, axis=2).reshape(-1, 64)


LAYOUTS = {
    DType.Q4_0: Layout(32, 0, None, -8, 7, *_four(2)),
    DType.Q4_1: Layout(32, 0, 2, 0, 15, *_four(4)),
    DType.Q5_0: Layout(32, 0, None, -16, 15, *_five(2)),
    DType.Q5_1: Layout(32, 0, 2, 0, 31, *_five(4)),
    DType.IQ4_NL: Layout(32, 0, None, -127, 113, *_four(2), levels=_LEVELS),
    DType.Q4_K: Layout(32, 0, 2, 0, 15, _unpack_q4_k, _pack_q4_k, _parts_k),
    DType.Q5_K: Layout(32, 0, 2, 0, 31, _unpack_q5_k, _pack_q5_k, _parts_k),
    DType.Q6_K: Layout(16, 208, None, -32, 31, _unpack_q6_k, _pack_q6_k, _parts_q6_k),
}
