"""Quantised tensors of Hugging Face checkpoints, decoded row by row.

A reader is what `LazyTensor.read` is: called, it gives the whole tensor. `rows` gives some of it,
so that a tensor never has to be there as a whole.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.tensor import LazyTensor, RowReader, StoredRows

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# e2m1, by its code of 4 bits (OCP Microscaling Formats 1.0, 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_GROUP = 32
# A larger exponent makes 6 · 2^e more than float32 holds; 255 is the format's NaN.
_LARGEST = 252
_BIAS = 127
_opened = threading.local()


@dataclass(frozen=True, slots=True)
class ScaledRows(StoredRows):
    """Numbers of 8 bits times a scale for each block of them, as float32.

    Attributes:
        values: (..., rows, columns) as stored.
        scales: (..., rows of blocks, columns of blocks), or a single number.
        grid: its last two sizes.
        block: rows and columns of a block; those at the end may be cut off.
    """

    scales: LazyTensor
    grid: tuple[int, int]
    block: tuple[int, int]

    def __call__(self) -> memoryview:
        """Decode the whole tensor."""
        return self.rows(0, self.values.size // self.values.shape[-1])

    def rows(self, begin: int, end: int) -> memoryview:
        """Return rows [begin, end) of the tensor as (-1, columns), float32.

        Raises:
            FormatError: if a scale is not finite.
            TruncatedFileError: if a file has become shorter.
        """
        import numpy as np

        height, width = self.values.shape[-2:]
        data = np.frombuffer(self.values.rows(begin, end).tobytes(), dtype=np.uint8)
        # Every byte is in the table; `clip` only spares a check.
        decoded = _eight_bits(self.values.dtype).take(data, mode="clip").reshape(-1, width)
        matrix, row = np.divmod(np.arange(begin, end), height)
        if self.scales.size == 1:
            matrix = np.zeros_like(matrix)
        places = matrix * self.grid[0] + row // self.block[0]
        if len(places):
            scales = self._scales(int(places[0]), int(places[-1]) + 1)
            _multiply(decoded, scales[places - places[0]], self.block[1])
        return decoded.reshape(-1).view(np.uint8).data

    def _scales(self, begin: int, end: int) -> Array:
        """Return rows of the grid as float32; bytes are exponents (e8m0)."""
        import numpy as np

        stored = self.scales.in_rows_of(self.grid[1]).rows(begin, end).numpy()
        if self.scales.dtype is DType.U8:
            found = np.ldexp(np.float32(1), stored.astype(np.int32) - _BIAS)
            found[stored == 255] = np.nan  # noqa: PLR2004  (the format's NaN)
        else:
            found = stored.astype(np.float32)
        if not np.isfinite(found).all():
            raise FormatError(f"a scale of {self.values} is not finite", path=self.scales.path)
        return found


@dataclass(frozen=True, slots=True)
class PackedRows(StoredRows):
    """MXFP4, turned: 32 numbers of 4 bits and their exponent become a column, as bfloat16.

    All values are exact: e2m1 has two significant bits, and bfloat16 all exponents of e8m0. The
    stored groups run along what are rows here, so an expert's bytes are kept while it is read, and
    the 32 rows of the group that was decoded last; one expert for each thread.

    Attributes:
        values: (E, out, groups, 16) bytes, the low half first.
        scales: (E, out, groups) bytes, exponents.
    """

    scales: LazyTensor

    @property
    def stored(self) -> DType:
        """MXFP4, by the name that ggml has for it; this layout is another one."""
        return DType.MXFP4

    def __call__(self) -> memoryview:
        """Decode the whole tensor."""
        experts, _, groups, _ = self.values.shape
        return self.rows(0, experts * groups * _GROUP)

    def rows(self, begin: int, end: int) -> memoryview:
        """Return rows [begin, end) of the parameter as (-1, out), bfloat16.

        Raises:
            FormatError: if a scale is beyond float32.
            TruncatedFileError: if a file has become shorter.
        """
        import numpy as np

        found = np.empty((end - begin, self.values.shape[1]), dtype=np.uint16)
        cuts = sorted({begin, end, *range(-(-begin // _GROUP) * _GROUP, end, _GROUP)})
        for start, stop in pairwise(cuts):
            group, first = divmod(start, _GROUP)
            decoded = self._group(group)
            found[start - begin : stop - begin] = decoded[first : first + stop - start]
        return found.reshape(-1).view(np.uint8).data

    def _group(self, group: int) -> Array:
        """Return the 32 rows of a group, counted through all experts."""
        known = getattr(_opened, "group", None)
        if known is not None and known[0] is self and known[1] == group:
            return known[2]
        expert, place = divmod(group, self.values.shape[2])
        codes, exponents = self._expert(expert)
        decoded = _four_bits(codes[:, place], exponents[:, place])
        _opened.group = (self, group, decoded)
        return decoded

    def _expert(self, expert: int) -> tuple[Array, Array]:
        """Return the bytes of one expert, (out, groups, 16) and (out, groups)."""
        import numpy as np

        known = getattr(_opened, "expert", None)
        if known is not None and known[0] is self and known[1] == expert:
            return known[2]
        _opened.expert = None  # before the next is there
        _, height, groups, width = self.values.shape
        rows = expert * height, (expert + 1) * height
        codes = self.values.in_rows_of(groups * width).rows(*rows).numpy()
        exponents = np.frombuffer(self.scales.in_rows_of(groups).rows(*rows).tobytes(), np.uint8)
        if exponents.max(initial=0) > _LARGEST:
            raise FormatError(f"a scale of {self.values} is not finite", path=self.scales.path)
        found = codes.reshape(height, groups, width), exponents.reshape(height, groups)
        _opened.expert = (self, expert, found)
        return found


def stored_type(tensor: LazyTensor) -> DType:
    """Return the type of a tensor in its file, whatever it is decoded to."""
    return tensor.read.stored if isinstance(tensor.read, RowReader) else tensor.dtype


def _four_bits(codes: Array, exponents: Array) -> Array:
    """Decode (out, 16) bytes and (out,) exponents to (32, out), the bits of bfloat16."""
    import numpy as np

    keys = codes.astype(np.uint16)
    keys += (exponents.astype(np.uint16) << 8)[:, None]
    return np.ascontiguousarray(_pairs().take(keys).view(np.uint16).T)


@cache
def _pairs() -> Array:
    """Return the two bfloat16 numbers of every exponent and byte, the first in the low half."""
    import numpy as np

    with np.errstate(over="ignore"):  # what overflows is refused when it is read
        exact = np.ldexp(np.array(_E2M1, np.float32), np.arange(256)[:, None] - _BIAS)
    halves = exact.astype(np.float32).view(np.uint32) >> 16
    return (halves[:, None, :] | halves[:, :, None] << 16).reshape(-1)


def _multiply(values: Array, scales: Array, width: int) -> None:
    """Scale every row of `values` in place, `width` columns at a time."""
    whole = values.shape[1] // width
    blocks = values[:, : whole * width].reshape(len(values), whole, width)
    blocks *= scales[:, :whole, None]
    if whole * width < values.shape[1]:
        values[:, whole * width :] *= scales[:, whole:]


@cache
def _eight_bits(dtype: DType) -> Array:
    """Return the float32 value of every byte."""
    import numpy as np

    codes = np.arange(256, dtype=np.uint8)
    found = codes.view(dtype.numpy()).astype(np.float32)
    found.flags.writeable = False
    return found
