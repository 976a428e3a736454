"""What training scripts save beside tensors: numpy's scalars and arrays, argparse's options.

Each is read as plain data: a scalar becomes Python's number, an array and a Namespace what their
pickles say of them. Nothing is imported, numpy included.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, cast

from adapterkit.containers.pickle_names import Constructor, Record, RecordClass

if TYPE_CHECKING:
    from collections.abc import Mapping

# numpy's kind and size -> the format of `struct`.
_FORMATS = {
    "b1": "?",
    "f2": "e",
    "f4": "f",
    "f8": "d",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
}
_DTYPE = "numpy.dtype"
# A kind, and its bytes or letters.
_NAME = re.compile(r"[biufcmMOSUV]\d{1,9}")


def _dtype(arguments: tuple[object, ...]) -> Record:
    match arguments:
        case (str(name), *_) if _NAME.fullmatch(name):
            return Record(_DTYPE, arguments)
        case _:
            raise ValueError("numpy.dtype of something that is no name of one")


def _scalar(arguments: tuple[object, ...]) -> object:
    """Return the number of a numpy scalar; of other types what its pickle says."""
    match arguments:
        case (Record(kind="numpy.dtype", arguments=(str(name), *_)) as dtype, bytes(data)):
            code = _FORMATS.get(name)
        case _:
            raise ValueError("a numpy scalar without a type and its bytes")
    if code is None:
        return Record("numpy.scalar", (name, data))
    state = cast("tuple[object, ...]", dtype.state if type(dtype.state) is tuple else ())
    order = ">" if state[1:2] == (">",) else "<"
    try:
        (value,) = struct.unpack(order + code, data)
    except struct.error as error:
        raise ValueError(f"a numpy scalar of {len(data)} bytes that is {name}") from error
    return value


def _array(arguments: tuple[object, ...]) -> Record:
    # The shape, the type and the bytes are set later, as its state.
    return Record("numpy.ndarray", arguments[1:])


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
TRAINING_NAMES: Mapping[tuple[str, str], object] = {
    ("argparse", "Namespace"): RecordClass("Namespace"),
    ("numpy", "dtype"): Constructor(_DTYPE, _dtype),
    ("numpy", "ndarray"): RecordClass("numpy.ndarray"),
    **{(module, "scalar"): Constructor("numpy.scalar", _scalar) for module in _NUMPY},
    **{(module, "_reconstruct"): Constructor("numpy.ndarray", _array) for module in _NUMPY},
}
