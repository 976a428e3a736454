"""Element types of stored tensors, plain and block-quantised."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np


class DType(StrEnum):
    """The type of a stored tensor, named as safetensors and ggml name it.

    Plain types have one element per block. Quantised types pack `block` consecutive elements of the
    last axis into `block_bytes` bytes.
    """

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    F8_E8M0 = "F8_E8M0"
    I64 = "I64"
    I32 = "I32"
    I16 = "I16"
    I8 = "I8"
    U64 = "U64"
    U32 = "U32"
    U16 = "U16"
    U8 = "U8"
    BOOL = "BOOL"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q8_0 = "Q8_0"
    Q2_K = "Q2_K"
    Q3_K = "Q3_K"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"
    Q8_K = "Q8_K"
    IQ1_S = "IQ1_S"
    IQ1_M = "IQ1_M"
    IQ2_XXS = "IQ2_XXS"
    IQ2_XS = "IQ2_XS"
    IQ2_S = "IQ2_S"
    IQ3_XXS = "IQ3_XXS"
    IQ3_S = "IQ3_S"
    IQ4_NL = "IQ4_NL"
    IQ4_XS = "IQ4_XS"
    TQ1_0 = "TQ1_0"
    TQ2_0 = "TQ2_0"
    MXFP4 = "MXFP4"
    NVFP4 = "NVFP4"

    @property
    def block(self) -> int:
        """Elements in one block: 1 for plain types."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return _BLOCKS[self][1]

    @property
    def quantised(self) -> bool:
        """Whether values must be decoded block by block."""
        return self.block > 1

    @property
    def floating(self) -> bool:
        """Whether the values are real numbers, plain or quantised."""
        return self.quantised or (self.value[0] in "FB" and self is not DType.BOOL)

    @property
    def scaled(self) -> bool:
        """Whether the values of a base's weight mean nothing without scales stored beside them."""
        return self.value.startswith("F8_")

    @property
    def smallest_normal(self) -> float:
        """Smallest number of full precision; 0 for types that are none of real numbers alone."""
        if self.quantised or not self.floating:
            return 0.0
        import ml_dtypes

        limits = cast("Any", ml_dtypes).finfo(self.numpy())
        return float(limits.smallest_normal)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a tensor of `shape` takes; shapes must hold whole blocks."""
        count = 1
        for size in shape:
            count *= size
        return count // self.block * self.block_bytes

    @cache
    def numpy(self) -> np.dtype[Any]:
        """Return the little-endian numpy dtype of a plain type (bf16 and fp8 from ml_dtypes)."""
        import numpy as np

        if self.quantised:
            raise TypeError(f"{self} has no numpy dtype; LazyTensor.numpy() decodes it to float32")
        if self in _EXTENDED:
            import ml_dtypes

            return np.dtype(getattr(ml_dtypes, _EXTENDED[self]))
        return np.dtype(_NUMPY[self])

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> DType:
        """Return the member for a numpy dtype.

        Raises:
            TypeError: if no stored type corresponds to it.
        """
        for member in (*_NUMPY, *_EXTENDED):
            if member.numpy() == dtype:
                return member
        raise TypeError(f"no stored type for numpy dtype {dtype}")


_NUMPY = {
    DType.F64: "<f8",
    DType.F32: "<f4",
    DType.F16: "<f2",
    DType.I64: "<i8",
    DType.I32: "<i4",
    DType.I16: "<i2",
    DType.I8: "i1",
    DType.U64: "<u8",
    DType.U32: "<u4",
    DType.U16: "<u2",
    DType.U8: "u1",
    DType.BOOL: "?",
}
_EXTENDED = {
    DType.BF16: "bfloat16",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.F8_E5M2: "float8_e5m2",
    DType.F8_E8M0: "float8_e8m0fnu",
}
# (elements, bytes) of a block; the quantised rows are ggml's type traits.
_BLOCKS = {
    DType.F64: (1, 8),
    DType.F32: (1, 4),
    DType.F16: (1, 2),
    DType.BF16: (1, 2),
    DType.F8_E4M3: (1, 1),
    DType.F8_E5M2: (1, 1),
    DType.F8_E8M0: (1, 1),
    DType.I64: (1, 8),
    DType.I32: (1, 4),
    DType.I16: (1, 2),
    DType.I8: (1, 1),
    DType.U64: (1, 8),
    DType.U32: (1, 4),
    DType.U16: (1, 2),
    DType.U8: (1, 1),
    DType.BOOL: (1, 1),
    DType.Q4_0: (32, 18),
    DType.Q4_1: (32, 20),
    DType.Q5_0: (32, 22),
    DType.Q5_1: (32, 24),
    DType.Q8_0: (32, 34),
    DType.Q2_K: (256, 84),
    DType.Q3_K: (256, 110),
    DType.Q4_K: (256, 144),
    DType.Q5_K: (256, 176),
    DType.Q6_K: (256, 210),
    DType.Q8_K: (256, 292),
    DType.IQ1_S: (256, 50),
    DType.IQ1_M: (256, 56),
    DType.IQ2_XXS: (256, 66),
    DType.IQ2_XS: (256, 74),
    DType.IQ2_S: (256, 82),
    DType.IQ3_XXS: (256, 98),
    DType.IQ3_S: (256, 110),
    DType.IQ4_NL: (32, 18),
    DType.IQ4_XS: (256, 136),
    DType.TQ1_0: (256, 54),
    DType.TQ2_0: (256, 66),
    DType.MXFP4: (32, 17),
    DType.NVFP4: (64, 36),
}
