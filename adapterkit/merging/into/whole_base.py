"""Whether a Hugging Face base is there whole, in numbers that can be added to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.base.opening import INDEX, weight_map
from adapterkit.base.quantised import decoded as decoded_base
from adapterkit.base.schemes import Refused, decodable, quantisation
from adapterkit.containers.safetensors import read_safetensors
from adapterkit.errors import FormatError, NotFoundError, UnsupportedError

if TYPE_CHECKING:
    from adapterkit.base.model import BaseModel
    from adapterkit.base.quantised import DecodedBase


def checked(base: BaseModel, *, dequantize: bool) -> DecodedBase | None:
    """Return the base decoded, or None if nothing says that it is quantised.

    Raises:
        UnsupportedError: if it is quantised and is not to be decoded, or cannot be; says what to
            do.
        NotFoundError: if shards are missing.
        FormatError: if shards share a name, or quantised values and scales do not fit.
    """
    scheme = quantisation(base)
    if isinstance(scheme, Refused):
        raise UnsupportedError(
            f"is quantised ({scheme.name}), and rounding to its grid again would erase much of an "
            "update: merge into the 16-bit original, and quantise the result if you need to; "
            f"--dequantize decodes {decodable()}",
            path=base.path,
        )
    if scheme and not dequantize:
        raise UnsupportedError(
            f"is quantised ({scheme.name}): pass --dequantize to store the whole result in 16 "
            "bits, or merge into the 16-bit original",
            path=base.path,
        )
    _check_stored(base)
    return decoded_base(base, scheme) if scheme else None


def _check_stored(base: BaseModel) -> None:
    if not base.has_tensors:
        raise UnsupportedError(
            "has no safetensors weights; save it with save_pretrained(safe_serialization=True)",
            path=base.path,
        )
    _check_complete(base)


def _check_complete(base: BaseModel) -> None:
    """Refuse a checkpoint of which shards are missing, or whose shards share a name."""
    if not (base.path / INDEX).is_file():
        return
    listed = weight_map(base.path)
    for name, shard in listed.items():
        if name not in base.tensors:
            raise NotFoundError(
                f"{shard.name} does not hold it or is missing; download the model again",
                path=base.path,
                where=name,
            )
    files = dict.fromkeys(listed.values())
    held = sum(len(read_safetensors(file).tensors) for file in files)
    if held != len(base.tensors):
        raise FormatError(
            f"{held - len(base.tensors)} tensors are in more than one shard", path=base.path
        )
