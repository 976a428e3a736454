"""ggml's kernels and the gguf package's give the same values, and the same bytes where both can."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest

from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError
from adapterkit.quantisation import check_encodable, dequantise, ggml, quantise

WRITTEN = [dtype for dtype in DType if dtype.quantised and ggml.encodes(dtype)]
VALUES = (np.random.default_rng(5).standard_normal((3, 512)) * 0.1).astype(np.float32)


def test_the_kernels_are_here() -> None:
    assert {DType.Q4_K, DType.Q6_K, DType.Q8_0, DType.IQ4_XS} <= set(WRITTEN)


@pytest.mark.parametrize("dtype", WRITTEN)
def test_values_are_those_of_the_gguf_package(dtype: DType) -> None:
    packed = np.frombuffer(quantise(VALUES, dtype), np.uint8)
    kind = gguf.GGMLQuantizationType[dtype.value]
    assert packed.size == dtype.nbytes(VALUES.shape)
    theirs = gguf.quants.dequantize(packed.reshape(3, -1), kind)
    assert np.array_equal(dequantise(packed, dtype, VALUES.shape), theirs)
    # Coarse as a type may be, ternary even, it holds these values and not others.
    assert np.corrcoef(theirs.reshape(-1), VALUES.reshape(-1))[0, 1] > 0.5


@pytest.mark.parametrize("dtype", [d for d in WRITTEN if "_K" not in d and "IQ" not in d])
def test_bytes_are_those_of_the_gguf_package(dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = bytes(quantise(VALUES, dtype))
    kind = gguf.GGMLQuantizationType[dtype.value]
    assert packed == gguf.quants.quantize(VALUES, kind).tobytes()
    monkeypatch.setattr(ggml, "_quantiser", lambda: None)
    monkeypatch.setattr(ggml, "_dequantiser", lambda _: None)
    assert bytes(quantise(VALUES, dtype)) == packed
    there = dequantise(np.frombuffer(packed, np.uint8), dtype, VALUES.shape)
    monkeypatch.undo()
    here = dequantise(np.frombuffer(packed, np.uint8), dtype, VALUES.shape)
    assert np.array_equal(here, there)


@pytest.mark.parametrize("dtype", [DType.IQ1_S, DType.IQ2_XXS, DType.IQ3_XXS])
def test_what_needs_an_importance_matrix_never_reaches_the_kernel(dtype: DType) -> None:
    with pytest.raises(UnsupportedError, match="importance matrix"):
        quantise(VALUES, dtype)


def test_without_a_kernel_a_type_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_quantiser", lambda: None)
    with pytest.raises(UnsupportedError, match=r"pip install xllamacpp"):
        check_encodable(DType.Q5_K)
    check_encodable(DType.Q8_0)


def test_q8_k_is_decoded_as_ggml_does() -> None:
    kernel = ggml._library().dequantize_row_q8_K
    kernel.restype, kernel.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    blocks = np.random.default_rng(3).integers(0, 256, (4, 292), dtype=np.uint8)
    blocks[:, :4] = np.array([[0.5], [-2e-3], [1e-42], [3e38]], np.float32).view(np.uint8)
    want = np.empty((2, 512), np.float32)
    kernel(blocks.ctypes.data, want.ctypes.data, want.size)
    assert np.array_equal(dequantise(blocks.reshape(-1), DType.Q8_K, (2, 512)), want)
