"""Tensors as `torch.save` pickles them: a storage, an offset, sizes and strides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.containers.opening import MAX_BYTES, check_shape
from adapterkit.containers.pickle_names import Constructor, Refused
from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np


@dataclass(frozen=True, slots=True)
class StorageType:
    """A storage class of torch, by name only.

    Attributes:
        name: as in torch, `FloatStorage`.
        dtype: type of its elements; None if untyped, or if `DType` has no such type.
        item_bytes: bytes of one element.
    """

    name: str
    dtype: DType | None
    item_bytes: int


@dataclass(frozen=True, slots=True)
class Storage:
    """One member `data/N` of the archive: a row of elements that several tensors may share."""

    kind: StorageType
    data: FileSlice


@dataclass(frozen=True, slots=True)
class TensorClass:
    """`torch.Tensor` or a subclass that adds nothing to the data."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class PickledTensor:
    """What a pickle says of a tensor, not yet compared with the storage.

    Attributes:
        storage: where the elements are.
        dtype: their type, None if `DType` has no such type.
        stored_as: torch's name of that type.
        offset: first element.
        shape: sizes.
        strides: steps in elements.
        lazy_bits: whether the values are negated or conjugated only when they are used.
    """

    storage: Storage
    dtype: DType | None
    stored_as: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    lazy_bits: bool

    def resolve(self, where: str) -> LazyTensor:
        """Return the tensor, whose elements are known to lie inside the storage.

        Raises:
            FormatError: naming the tensor as `where`, if an element lies outside, elements repeat
                so that it is larger than its storage, or its type cannot be read.
        """
        data = self.storage.data
        if self.dtype is None:
            raise FormatError(
                f"holds {self.stored_as}, which cannot be read; save it as a real dtype",
                path=data.path,
                where=where,
            )
        if self.lazy_bits:
            raise FormatError(
                "has torch's lazy neg or conj bit; save tensor.clone() instead",
                path=data.path,
                where=where,
            )
        check_shape(self.dtype, self.shape, path=data.path, where=where)
        item = self.dtype.block_bytes
        span = self._span(where, data.length // item)
        nbytes = self.dtype.nbytes(self.shape)
        if nbytes > data.length:
            raise FormatError(
                f"repeats elements: {nbytes} bytes of a storage of {data.length}; "
                "save tensor.contiguous() instead",
                path=data.path,
                where=where,
            )
        begin = data.offset + (self.offset * item if span else 0)
        place = FileSlice(data.path, begin, span * item)
        if span == 0 or self._contiguous:
            return LazyTensor(self.dtype, self.shape, place)
        return LazyTensor(
            self.dtype, self.shape, StridedSlice(place, item, self.shape, self.strides)
        )

    def _span(self, where: str, available: int) -> int:
        """Return how many elements of the storage lie from the first to the last one used."""
        path = self.storage.data.path
        if max(self.offset, *self.strides, 0) > MAX_BYTES:
            raise FormatError("has an offset or stride that none can be", path=path, where=where)
        if len(self.strides) != len(self.shape) or min(self.strides, default=0) < 0:
            raise FormatError("its strides do not fit its shape", path=path, where=where)
        if not math.prod(self.shape) and self.offset >= 0:
            # Slicing an empty tensor moves its offset past the end, and no element is there.
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps)
        if not 0 <= self.offset <= available - span:
            raise FormatError(
                f"reaches outside its storage of {available} elements", path=path, where=where
            )
        return span

    @property
    def _contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class StridedSlice:
    """Elements of a file that are not in order, put in order at each call.

    Attributes:
        data: from the first to the last element used.
        item_bytes: bytes of one element.
        shape: sizes.
        strides: steps in elements, so that every element lies in `data`.
    """

    data: FileSlice
    item_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self) -> memoryview:
        """Read the elements in C order.

        Raises:
            TruncatedFileError: if the file has become shorter.
        """
        import numpy as np

        items: np.ndarray[Any, Any] = np.frombuffer(self.data(), dtype=f"u{self.item_bytes}")
        steps = zip(self.shape, self.strides, strict=True)
        # The stride of an axis of size 1 means nothing and may be any number.
        strides = [0 if size == 1 else stride * self.item_bytes for size, stride in steps]
        view = np.lib.stride_tricks.as_strided(items, self.shape, strides, writeable=False)
        return np.ascontiguousarray(view).reshape(-1).view(np.uint8).data


def _sizes(value: Any) -> tuple[int, ...]:
    match value:
        case [*items] if all(type(item) is int for item in items):
            return tuple(items)
        case _:
            raise ValueError("sizes that are no integers")


def _tensor_v2(arguments: tuple[object, ...]) -> PickledTensor:
    match arguments:
        case (Storage() as storage, int(offset), size, stride, bool(), _, *rest) if len(rest) <= 1:
            kind = storage.kind
            shape, strides = _sizes(size), _sizes(stride)
            return PickledTensor(storage, kind.dtype, kind.name, offset, shape, strides, any(rest))
        case _:
            raise ValueError("_rebuild_tensor_v2 with other arguments than torch writes")


def _tensor_v3(arguments: tuple[object, ...]) -> PickledTensor:
    match arguments:
        case (Storage() as storage, int(offset), size, stride, bool(), _, str(code), *rest) if (
            len(rest) <= 1 and code in DTYPES
        ):
            shape, strides = _sizes(size), _sizes(stride)
            return PickledTensor(storage, DTYPES[code], code, offset, shape, strides, any(rest))
        case _:
            raise ValueError("_rebuild_tensor_v3 with other arguments than torch writes")


def _parameter(arguments: tuple[object, ...]) -> PickledTensor:
    match arguments:
        case (PickledTensor() as tensor, bool(), _) | (PickledTensor() as tensor, bool(), _, _):
            return tensor
        case _:
            raise ValueError("_rebuild_parameter with other arguments than torch writes")


def _from_type(arguments: tuple[Any, ...]) -> object:
    """Rebuild a tensor that has Python attributes; they are dropped."""
    match arguments:
        case (Constructor() as function, TensorClass(), [*inner], _) if function.name in _REBUILD:
            return function.build(tuple(inner))
        case _:
            raise ValueError("_rebuild_from_type_v2 of something that is no tensor")


def _size(arguments: tuple[object, ...]) -> tuple[int, ...]:
    match arguments:
        case (sizes,):
            return _sizes(sizes)
        case _:
            raise ValueError("torch.Size of other arguments than one tuple")


def _device(arguments: tuple[object, ...]) -> str:
    match arguments:
        case (str(kind),):
            return kind
        case (str(kind), int(index)) if len(kind) <= _LONGEST_DEVICE:
            return f"{kind}:{index}"
        case _:
            raise ValueError("torch.device of other arguments than torch writes")


_LONGEST_DEVICE = 32
DTYPES: Mapping[str, DType | None] = {
    "torch.float64": DType.F64,
    "torch.float32": DType.F32,
    "torch.float16": DType.F16,
    "torch.bfloat16": DType.BF16,
    "torch.float8_e4m3fn": DType.F8_E4M3,
    "torch.float8_e5m2": DType.F8_E5M2,
    "torch.int64": DType.I64,
    "torch.int32": DType.I32,
    "torch.int16": DType.I16,
    "torch.int8": DType.I8,
    "torch.uint64": DType.U64,
    "torch.uint32": DType.U32,
    "torch.uint16": DType.U16,
    "torch.uint8": DType.U8,
    "torch.bool": DType.BOOL,
    # Known, so that the message can name the tensor.
    "torch.float8_e4m3fnuz": None,
    "torch.float8_e5m2fnuz": None,
    "torch.float8_e8m0fnu": None,
    "torch.float4_e2m1fn_x2": None,
    "torch.complex32": None,
    "torch.complex64": None,
    "torch.complex128": None,
}
_STORAGES = (
    StorageType("DoubleStorage", DType.F64, 8),
    StorageType("FloatStorage", DType.F32, 4),
    StorageType("HalfStorage", DType.F16, 2),
    StorageType("BFloat16Storage", DType.BF16, 2),
    StorageType("LongStorage", DType.I64, 8),
    StorageType("IntStorage", DType.I32, 4),
    StorageType("ShortStorage", DType.I16, 2),
    StorageType("CharStorage", DType.I8, 1),
    StorageType("ByteStorage", DType.U8, 1),
    StorageType("BoolStorage", DType.BOOL, 1),
    StorageType("ComplexFloatStorage", None, 8),
    StorageType("ComplexDoubleStorage", None, 16),
)
_REBUILD = {
    "_rebuild_tensor_v2": _tensor_v2,
    "_rebuild_tensor_v3": _tensor_v3,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
}
_DISTRIBUTED = Refused(
    "holds one rank's part of distributed tensors (DTensor, ShardedTensor); gather them in "
    "training (full_tensor()), or pass what torch.distributed.checkpoint saved of all ranks"
)
TORCH_NAMES: Mapping[tuple[str, str], object] = {
    **{("torch", kind.name): kind for kind in _STORAGES},
    ("torch.storage", "UntypedStorage"): StorageType("UntypedStorage", None, 1),
    # A dtype stands for itself as text: a pickle that writes the text gains nothing by it.
    **{("torch", code.removeprefix("torch.")): code for code in DTYPES},
    **{("torch._utils", name): Constructor(name, build) for name, build in _REBUILD.items()},
    ("torch._tensor", "_rebuild_from_type_v2"): Constructor("_rebuild_from_type_v2", _from_type),
    ("torch", "Tensor"): TensorClass("torch.Tensor"),
    ("torch.nn.parameter", "Parameter"): TensorClass("torch.nn.Parameter"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _DISTRIBUTED,
    ("torch.distributed.tensor", "DTensor"): _DISTRIBUTED,
    ("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"): _DISTRIBUTED,
    ("torch", "Size"): Constructor("torch.Size", _size),
    ("torch", "device"): Constructor("torch.device", _device),
}
