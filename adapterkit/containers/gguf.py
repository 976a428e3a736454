"""The GGUF byte container: metadata and tensors of any ggml file, with no idea of LoRA."""

from adapterkit.containers.gguf_reader import GGUFFile, read_gguf
from adapterkit.containers.gguf_values import (
    GGUFArray,
    GGUFValue,
    Scalar,
    Typed,
    ValueType,
    array,
    float32,
    int32,
    uint32,
    uint64,
)
from adapterkit.containers.gguf_writer import gguf_layout, write_gguf

__all__ = [
    "GGUFArray",
    "GGUFFile",
    "GGUFValue",
    "Scalar",
    "Typed",
    "ValueType",
    "array",
    "float32",
    "gguf_layout",
    "int32",
    "read_gguf",
    "uint32",
    "uint64",
    "write_gguf",
]
