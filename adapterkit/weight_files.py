"""Whether a file holds weights, and whether they are an adapter's: by its name and a few bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.storage import readable

if TYPE_CHECKING:
    from pathlib import Path

# No other file is called so, whatever its bytes are.
_SUFFIXES = frozenset(
    {
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".h5", ".hdf5"),
        *(".keras", ".msgpack", ".onnx", ".pkl", ".pickle", ".joblib", ".gguf", ".ggml"),
        *(".tflite", ".pb", ".pdparams", ".mlmodel", ".tar", ".ot"),
    }
)
# A zip (torch, NumPy, Keras), NumPy, HDF5, GGUF; then what is compressed and cannot be looked into.
_STARTS = (
    *(b"PK\x03\x04", b"\x93NUMPY", b"\x89HDF\r\n\x1a\n", b"GGUF"),
    *(b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c"),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05][^\x00-\x1f\x7f]")
_TAR, _TAR_AT = b"ustar", 257
_LENGTH = 8
# As formats of adapters name their tensors, in a header, an index or a pickle alike.
_FACTOR = re.compile(
    rb"lora_(?:embedding_)?[ABab](?![A-Za-z])|lora_(?:down|up)\b|\blokr_w\d|\bhada_w\d"
)
_HEAD, _TAIL = 1 << 18, 1 << 16


@dataclass(frozen=True, slots=True)
class Held:
    """What a file was found to hold.

    Attributes:
        weights: whether it holds tensors, or may do so where nothing can tell.
        factors: whether those are, by their names, of an adapter.
    """

    weights: bool
    factors: bool


def held(path: Path) -> Held:
    """Look at a file's name and its first and last bytes; no container is parsed.

    Raises:
        FormatError: if the file cannot be read.
    """
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(_LENGTH + _TAR_AT)
        if not (_named(path.name) or _begins(start, size)):
            return Held(weights=False, factors=False)
        start += file.read(_HEAD)
        file.seek(max(file.tell(), size - _TAIL))
        return Held(weights=True, factors=bool(_FACTOR.search(start + b"\0" + file.read(_TAIL))))


def _named(name: str) -> bool:
    return f".{name.lower().rpartition('.')[2]}" in _SUFFIXES


def _begins(start: bytes, size: int) -> bool:
    length = int.from_bytes(start[:_LENGTH], "little")
    header = start[_LENGTH : _LENGTH + 1] == b"{" and length <= size - _LENGTH
    tar = start[_TAR_AT:].startswith(_TAR)
    return header or tar or start.startswith(_STARTS) or bool(_PICKLE.match(start))
