"""A tensor is a dtype, a shape, and a way to get the bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.storage import FileSlice

if TYPE_CHECKING:
    import numpy as np


class RowReader(ABC):
    """A `LazyTensor.read` that computes values and can give some rows without the others."""

    __slots__ = ()

    @property
    @abstractmethod
    def path(self) -> Path:
        """The file that holds what they are computed from."""

    @property
    @abstractmethod
    def stored(self) -> DType:
        """The type that is stored there."""

    @abstractmethod
    def __call__(self) -> bytes | bytearray | memoryview:
        """Return the bytes of the whole tensor."""

    @abstractmethod
    def rows(self, begin: int, end: int) -> memoryview:
        """Return the bytes of rows [begin, end) of the tensor as (-1, last axis)."""


@dataclass(frozen=True, slots=True)
class StoredRows(RowReader):
    """Rows that are decoded from the values of a file.

    Attributes:
        values: as stored, in one piece of the file.
    """

    values: LazyTensor

    @property
    def path(self) -> Path:
        """The file that holds the values."""
        return cast("FileSlice", self.values.read).path

    @property
    def stored(self) -> DType:
        """The type of the values."""
        return self.values.dtype


@dataclass(frozen=True, slots=True)
class Held:
    """A `LazyTensor.read` whose bytes are in memory."""

    data: bytes

    def __call__(self) -> bytes:
        """Return them."""
        return self.data


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is read only when it is asked for, every time anew.

    Another process gets a range of a file as that range, and computed values as their bytes.

    Attributes:
        dtype: type of the stored elements.
        shape: sizes in C order, the last axis contiguous.
        read: returns the little-endian C-order bytes; called once per access, never cached.
    """

    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[], bytes | bytearray | memoryview] = field(compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the range of a file where it is one, else as the bytes of the values."""
        read = self.read if isinstance(self.read, FileSlice) else Held(bytes(self.tobytes()))
        return LazyTensor, (self.dtype, self.shape, read)

    def __copy__(self) -> LazyTensor:
        """Return the tensor itself: it never changes."""
        return self

    def __deepcopy__(self, memo: object) -> LazyTensor:
        """Return the tensor itself: it never changes."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return self.dtype.nbytes(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes."""
        return len(self.shape) == 2  # noqa: PLR2004  (what the name says)

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count

    @property
    def path(self) -> Path | None:
        """The file that holds the values, or what they are computed from; None if no one does."""
        return getattr(self.read, "path", None)

    @property
    def source(self) -> Callable[[], bytes | bytearray | memoryview]:
        """The byte range that a tensor is, or else the method that checks what it reads."""
        if isinstance(self.read, FileSlice) and self.read.length == self.nbytes:
            return self.read
        return self.tobytes

    def tobytes(self) -> bytes | bytearray | memoryview:
        """Return the stored bytes, exactly `nbytes` of them."""
        data = self.read()
        if len(data) != self.nbytes:
            raise ValueError(f"{self.dtype} {list(self.shape)} got {len(data)} bytes")
        return data

    def numpy(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return a read-only array of `shape`; quantised tensors are decoded to float32.

        Raises:
            FormatError: if a boolean is neither 0 nor 1, which each program takes for another.
        """
        import numpy as np

        data = np.frombuffer(self.tobytes(), dtype=np.uint8)
        if self.dtype is DType.BOOL and data.size and data.max() > 1:
            message = f"holds a boolean that is {data.max()}, neither 0 nor 1"
            raise FormatError(message, path=self.path)
        if self.dtype.quantised:
            from adapterkit.quantisation import dequantise

            array = dequantise(data, self.dtype, self.shape)
        else:
            array = data.view(self.dtype.numpy()).reshape(self.shape)
        array.flags.writeable = False
        return array

    def rows(self, begin: int, end: int) -> LazyTensor:
        """Return some rows as a tensor of their own; of a file, only their bytes are read.

        Args:
            begin: first row, counted over all leading axes together.
            end: the row after the last.
        """
        width = self.shape[-1] if self.shape else 1
        size = self.dtype.nbytes((width,))
        span, offset, length = self.read, begin * size, (end - begin) * size
        read: Callable[[], bytes | memoryview]
        if isinstance(span, FileSlice):
            read = FileSlice(span.path, span.offset + offset, length)
        elif isinstance(span, RowReader):
            read = partial(span.rows, begin, end)
        else:
            read = partial(self._part, offset, length)

        return LazyTensor(self.dtype, (end - begin, width), read)

    def in_rows_of(self, width: int) -> LazyTensor:
        """Return the same elements as (-1, width); values that are computed by rows must stay."""
        return LazyTensor(self.dtype, (self.size // width, width), self.read)

    def blocks(self, elements: int) -> Iterator[LazyTensor]:
        """Yield the tensor piece by piece in C order, where its bytes can be read so.

        A range of a file is cut anywhere, values that are computed by rows between rows; whatever
        else there is comes whole.

        Args:
            elements: of a piece, about; a row is never cut if it is computed or quantised.
        """
        flat = self
        if isinstance(self.read, FileSlice) and not self.dtype.quantised:
            flat = self.in_rows_of(1)
        width = flat.shape[-1] if flat.shape else 1
        if not self.size or not isinstance(self.read, FileSlice | RowReader):
            yield self
            return
        height, step = self.size // width, max(1, elements // width)
        for begin in range(0, height, step):
            yield flat.rows(begin, min(begin + step, height))

    def _part(self, offset: int, length: int) -> memoryview:
        return memoryview(self.read()).cast("B")[offset : offset + length]

    def map(
        self,
        transform: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
        *,
        shape: tuple[int, ...] | None = None,
        dtype: DType | None = None,
    ) -> LazyTensor:
        """Return a lazy view whose array is `transform` of this one's.

        Args:
            transform: pure function of the array; its result is converted to `dtype`.
            shape: the shape that `transform` produces; this tensor's if omitted.
            dtype: the dtype to store; this tensor's (float32 if that is quantised) if omitted.
        """
        stored = dtype or (DType.F32 if self.dtype.quantised else self.dtype)
        return LazyTensor.computed(stored, shape or self.shape, lambda: transform(self.numpy()))

    def cast(self, dtype: DType) -> LazyTensor:
        """Return this tensor stored as `dtype`; itself when that changes nothing."""
        return self if dtype is self.dtype else self.map(lambda array: array, dtype=dtype)

    @classmethod
    def computed(
        cls, dtype: DType, shape: tuple[int, ...], values: Callable[[], np.ndarray[Any, Any]]
    ) -> LazyTensor:
        """Return a tensor whose values are computed at every access, and stored as `dtype`.

        What is not finite there is looked for before writing, by name; numpy says nothing.
        """

        def read() -> memoryview:
            import numpy as np

            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                return encode(values(), dtype)

        return cls(dtype, shape, read)

    @classmethod
    def of(cls, array: np.ndarray[Any, Any], dtype: DType | None = None) -> LazyTensor:
        """Wrap an array, stored as `dtype` if given; the array must not change afterwards."""
        stored = dtype or DType.of(array.dtype)
        return cls(stored, tuple(int(size) for size in array.shape), lambda: encode(array, stored))


def encode(array: np.ndarray[Any, Any], dtype: DType) -> memoryview:
    """Return the bytes of `array` as `dtype`, in C order; the same type keeps all bits."""
    import numpy as np

    if dtype.quantised:
        from adapterkit.quantisation import quantise

        return quantise(array, dtype)
    target = dtype.numpy()
    if array.dtype != target:
        # An overflow to inf is looked for before writing, by name; here it would only be noise.
        with np.errstate(over="ignore", invalid="ignore"):
            array = array.astype(target)
    # ml_dtypes arrays have no buffer format: the bytes go out through a uint8 view.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def same_bits(first: LazyTensor, second: LazyTensor) -> bool:
    """Tell whether two tensors are stored alike, to the bit."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return bytes(first.tobytes()) == bytes(second.tobytes())
