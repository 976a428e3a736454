"""One tensor of many pieces, each a box of it that lies in a place of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

    from adapterkit.dtype import DType

    Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Tile:
    """A piece of a tensor.

    Attributes:
        offset: where its first element stands in the whole, axis by axis.
        piece: its elements.
    """

    offset: tuple[int, ...]
    piece: LazyTensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """A `LazyTensor.read` that lays pieces side by side, every time anew.

    Attributes:
        item_bytes: bytes of one element.
        shape: of the whole, whose every element lies in one tile.
        tiles: the pieces.
    """

    item_bytes: int
    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]

    def __call__(self) -> memoryview:
        """Read the pieces and return the whole in C order."""
        import numpy as np

        kind = f"u{self.item_bytes}"
        whole: np.ndarray[Any, Any] = np.empty(self.shape, kind)
        for tile in self.tiles:
            sizes = zip(tile.offset, tile.piece.shape, strict=True)
            place = tuple(slice(begin, begin + size) for begin, size in sizes)
            data = np.frombuffer(tile.piece.tobytes(), kind)
            whole[place] = data.reshape(tile.piece.shape)
        return whole.reshape(-1).view(np.uint8).data


def joined(dtype: DType, shape: tuple[int, ...], tiles: Sequence[Tile]) -> LazyTensor:
    """Return the tensor that tiles make, which `gap` found to cover it."""
    if len(tiles) == 1:
        return LazyTensor(dtype, shape, tiles[0].piece.read)
    return LazyTensor(dtype, shape, Tiles(dtype.block_bytes, shape, tuple(tiles)))


def strung(dtype: DType, shape: tuple[int, ...], pieces: Iterable[LazyTensor]) -> LazyTensor:
    """Return the tensor whose elements in C order are those of rows (n, 1), one after the other."""
    rows = [piece for piece in pieces if piece.size]
    if len(rows) == 1:
        return LazyTensor(dtype, shape, rows[0].read)
    tiles: list[Tile] = []
    place = 0
    for piece in rows:
        tiles.append(Tile((place, 0), piece))
        place += piece.size
    return LazyTensor(dtype, shape, Tiles(dtype.block_bytes, (place, 1), tuple(tiles)))


def gap(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Return why boxes do not cover a shape, each element once, or None where they do.

    Args:
        shape: sizes of the whole.
        boxes: offsets and sizes of pieces.
    """
    for offset, sizes in boxes:
        if not len(offset) == len(sizes) == len(shape) or any(
            not 0 <= begin <= begin + size <= whole
            for begin, size, whole in zip(offset, sizes, shape, strict=True)
        ):
            return f"the piece {list(sizes)} at {list(offset)} does not lie in {list(shape)}"
    filled = sum(math.prod(sizes) for _, sizes in boxes)
    if filled < math.prod(shape):
        return f"its pieces have {filled} of {math.prod(shape)} elements"
    if filled > math.prod(shape) or _overlap(shape, boxes):
        return "two of its pieces overlap"
    return None


def _overlap(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Tell whether two boxes share an element, by a sweep along the axis that parts them most."""
    if not shape:
        return len(boxes) > 1
    axis = max(range(len(shape)), key=lambda axis: len({offset[axis] for offset, _ in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[0][axis]):
        begin = box[0][axis]
        active = [other for other in active if other[0][axis] + other[1][axis] > begin]
        if any(_meet(box, other) for other in active):
            return True
        active.append(box)
    return False


def _meet(one: Box, other: Box) -> bool:
    return all(
        begin < start + length and start < begin + size
        for begin, size, start, length in zip(*one, *other, strict=True)
    )
