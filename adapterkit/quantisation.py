"""Block-quantised values, through the kernels of the gguf package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.dtype import DType


def dequantise(
    data: np.ndarray[Any, Any], dtype: DType, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """Decode packed blocks to float32 values of `shape`.

    Args:
        data: uint8, the packed rows.
        dtype: the quantised type of the rows.
        shape: logical shape; the last axis holds whole blocks.

    Raises:
        NotImplementedError: if the gguf package has no kernel for the type.
    """
    import gguf
    import numpy as np

    if 0 in shape:
        return np.zeros(shape, dtype=np.float32)
    row_bytes = dtype.nbytes(shape[-1:])
    rows = data.reshape(-1, row_bytes)
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[dtype.value])
    return np.ascontiguousarray(values, dtype=np.float32).reshape(shape)


def quantise(array: np.ndarray[Any, Any], dtype: DType) -> memoryview:
    """Encode values as packed blocks along the last axis.

    Raises:
        NotImplementedError: if the gguf package has no kernel for the type.
    """
    import gguf
    import numpy as np

    values = np.ascontiguousarray(array, dtype=np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[dtype.value])
    return np.ascontiguousarray(packed).reshape(-1).view(np.uint8).data
