"""The references: what each says of a file that we have read, and of the values that we found.

Each raises whatever it raises where it refuses the file, and AssertionError for other values.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_MULTIARRAY: Any = np._core.multiarray  # type: ignore[attr-defined]  # where numpy pickles from
_RECONSTRUCTED = [
    (function, f"{module}.{function.__name__}")
    for function in (_MULTIARRAY.scalar, _MULTIARRAY._reconstruct)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
]
_DTYPES = {type(np.dtype(code)) for code in "?efdbhilqBHILQ"}


def _same(found: Mapping[str, Array], want: Mapping[str, Array]) -> None:
    assert found.keys() == want.keys(), f"names {sorted(found)[:3]} and {sorted(want)[:3]}"
    for name, values in want.items():
        mine = np.ascontiguousarray(found[name])
        assert mine.shape == values.shape, f"{name}: shapes {mine.shape} and {values.shape}"
        native = values.astype(values.dtype.newbyteorder("="), order="C")
        assert mine.tobytes() == native.tobytes(), f"{name}: values"


def safetensors(path: Path, found: Mapping[str, Array]) -> None:
    from safetensors import deserialize

    want = dict(deserialize(path.read_bytes()))
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert list(found[name].shape) == tensor["shape"], name
        assert np.ascontiguousarray(found[name]).tobytes() == bytes(tensor["data"]), name


def numpy(path: Path, found: Mapping[str, Array]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with np.load(path, allow_pickle=False) as file:
            _same(found, {name: file[name] for name in file.files})


def torch(path: Path, found: Mapping[str, Array]) -> None:
    import torch

    # What scripts save beside tensors is read as data, too.
    known = [argparse.Namespace, np.ndarray, np.dtype, *_DTYPES, *_RECONSTRUCTED]
    # Where a tensor was saved from is no concern of its values.
    with torch.serialization.safe_globals(known):
        root = torch.load(path, map_location="cpu", weights_only=True)
    _same(found, {name: _bits(tensor) for name, tensor in _tensors(root, "")})


def _bits(tensor: Any) -> Array:
    import torch

    plain = tensor.detach().resolve_conj().contiguous()
    width = plain.element_size()
    raw = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else np.zeros(0, np.uint8)
    return raw.view(f"u{width}").reshape(plain.shape)


def _tensors(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(node, torch.Tensor):
        yield name, node
    elif isinstance(node, dict | list | tuple):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def gguf(path: Path, found: Mapping[str, Array]) -> None:
    """Ask the gguf package, and llama.cpp's own parser."""
    from gguf import GGUFReader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = GGUFReader(path)
    shapes = {
        each.name: tuple(int(size) for size in reversed(each.shape)) for each in reader.tensors
    }
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    assert _llama_cpp()(str(path).encode(), _Params(no_alloc=True)), "llama.cpp refuses it"


class _Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


@cache
def _llama_cpp() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    (library,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    function = ctypes.CDLL(str(library)).gguf_init_from_file
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_char_p, _Params]
    return function


def onnxruntime(path: Path, found: Mapping[str, Array]) -> None:
    import onnx_oracle

    _same(found, onnx_oracle.parameters(path))
