"""ggml's kernels, out of whatever build of llama.cpp is installed as a Python package.

Only two functions of its C API are called, on arrays whose sizes are known here. The library is
found without importing the package, and loading it takes about 20 ms and 10 MiB.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

# Package -> the libraries in it that export ggml's API.
_HOLDERS = {
    "xllamacpp": ("xllamacpp*.so", "xllamacpp*.pyd"),
    "llama_cpp": ("lib/libggml-base.so", "lib/libggml-base.dylib", "lib/ggml-base.dll"),
}
# ggml's numbers of its types.
_TYPES = {
    DType.Q4_0: 2,
    DType.Q4_1: 3,
    DType.Q5_0: 6,
    DType.Q5_1: 7,
    DType.Q8_0: 8,
    DType.Q2_K: 10,
    DType.Q3_K: 11,
    DType.Q4_K: 12,
    DType.Q5_K: 13,
    DType.Q6_K: 14,
    DType.IQ4_NL: 20,
    DType.IQ3_S: 21,
    DType.IQ4_XS: 23,
    DType.TQ1_0: 34,
    DType.TQ2_0: 35,
    DType.MXFP4: 39,
}
_INT64 = ctypes.c_int64


def encodes(dtype: DType) -> bool:
    """Tell whether a kernel that writes this type is here."""
    return dtype in _TYPES and _quantiser() is not None


def encoded(values: np.ndarray[Any, Any], dtype: DType) -> memoryview | None:
    """Return float32 values as packed blocks along the last axis, or None without a kernel."""
    import numpy as np

    kernel = _quantiser()
    if kernel is None or dtype not in _TYPES or not values.size:
        return None
    packed = np.empty(dtype.nbytes(values.shape), np.uint8)
    width = values.shape[-1]
    rows = values.size // width
    kernel(_TYPES[dtype], values.ctypes.data, packed.ctypes.data, 0, rows, width, None)
    return packed.data


def decoded(
    data: np.ndarray[Any, Any], dtype: DType, shape: tuple[int, ...]
) -> np.ndarray[Any, Any] | None:
    """Return packed blocks as float32 values of `shape`, or None without a kernel."""
    import numpy as np

    kernel = _dequantiser(dtype)
    if kernel is None:
        return None
    packed = np.ascontiguousarray(data).reshape(-1)
    values = np.empty(shape, np.float32)
    if packed.size != dtype.nbytes(shape):
        raise ValueError(f"{dtype} {list(shape)} got {packed.size} bytes")
    kernel(packed.ctypes.data, values.ctypes.data, values.size)
    return values


@cache
def _library() -> ctypes.CDLL | None:
    for package, patterns in _HOLDERS.items():
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            files = [file for pattern in patterns for file in sorted(Path(folder).glob(pattern))]
            for file in files:
                try:
                    return ctypes.CDLL(str(file))
                except OSError:
                    continue  # built for another machine; the gguf package has what is needed
    return None


@cache
def _quantiser() -> Callable[..., int] | None:
    kernel = getattr(_library(), "ggml_quantize_chunk", None)
    if kernel is not None:
        pointer = ctypes.c_void_p
        kernel.restype = ctypes.c_size_t
        kernel.argtypes = [ctypes.c_int, pointer, pointer, _INT64, _INT64, _INT64, pointer]
    return kernel


@cache
def _dequantiser(dtype: DType) -> Callable[..., None] | None:
    name = dtype.value.lower().replace("_k", "_K")
    kernel = getattr(_library(), f"dequantize_row_{name}", None) if dtype in _TYPES else None
    if kernel is not None:
        kernel.restype = None
        kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, _INT64]
    return kernel
