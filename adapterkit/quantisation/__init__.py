"""Block-quantised values: ggml's own kernels where llama.cpp is installed, else the gguf package's.

Both give the same values and, where both have a kernel, the same bytes; ggml's are 10 times faster
and there is one for every type. The gguf package encodes no K and I types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError
from adapterkit.quantisation import ggml

if TYPE_CHECKING:
    import numpy as np

_IN_PYTHON = frozenset(
    {DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1, DType.Q8_0}
    | {DType.TQ1_0, DType.TQ2_0, DType.MXFP4}
)
# What is garbage without statistics of activations; ggml stops the process for some of them.
_IMPORTANCE = frozenset(
    {DType.IQ1_S, DType.IQ1_M, DType.IQ2_XXS, DType.IQ2_XS, DType.IQ2_S, DType.IQ3_XXS}
)


def check_encodable(dtype: DType) -> None:
    """Refuse a quantised type that nothing here can write.

    Raises:
        UnsupportedError: if it needs an importance matrix, or ggml's kernels and they are not here.
    """
    if dtype in _IMPORTANCE:
        raise UnsupportedError(
            f"{dtype} needs an importance matrix of the merged model: merge to f16 and use "
            "llama-imatrix and llama-quantize"
        )
    if dtype not in _IN_PYTHON and not ggml.encodes(dtype):
        raise UnsupportedError(
            f"{dtype} is quantised by llama.cpp's own kernels: pip install xllamacpp"
        )


def dequantise(
    data: np.ndarray[Any, Any], dtype: DType, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """Decode packed blocks to float32 values of `shape`.

    Args:
        data: uint8, the packed rows.
        dtype: the quantised type of the rows.
        shape: logical shape; the last axis holds whole blocks.

    """
    import numpy as np

    if 0 in shape:
        return np.zeros(shape, dtype=np.float32)
    if (values := ggml.decoded(data, dtype, shape)) is not None:
        return values
    import gguf

    rows = data.reshape(-1, dtype.nbytes(shape[-1:]))
    # What is not finite is looked for by name, before writing and when it is read back.
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype is DType.Q8_K:
            return _q8_k(rows.reshape(-1, dtype.block_bytes)).reshape(shape)
        decoded = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[dtype.value])
    return np.ascontiguousarray(decoded, dtype=np.float32).reshape(shape)


def _q8_k(blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Decode blocks of a float32 scale, 256 int8, and sums of these; the gguf package has none."""
    import numpy as np

    scales, numbers = blocks[:, :4].copy().view("<f4"), blocks[:, 4:260].view(np.int8)
    return scales * numbers.astype(np.float32)


def quantise(array: np.ndarray[Any, Any], dtype: DType) -> memoryview:
    """Encode values as packed blocks along the last axis.

    Raises:
        UnsupportedError: as `check_encodable`.
    """
    import numpy as np

    check_encodable(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ascontiguousarray(array, dtype=np.float32)
    if (packed := ggml.encoded(values, dtype)) is not None:
        return packed
    import gguf

    with np.errstate(over="ignore", invalid="ignore"):
        found = gguf.quants.quantize(values, gguf.GGMLQuantizationType[dtype.value])
    return np.ascontiguousarray(found).reshape(-1).view(np.uint8).data
