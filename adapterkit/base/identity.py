"""Which model a base is, told from a small part of its bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.storage import FileSlice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.base.model import BaseModel
    from adapterkit.tensor import LazyTensor

# What programs write into a config without changing the model.
_PASSING = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
# Samples of a tensor, and bytes of each.
_SAMPLES, _BYTES = 3, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """Which model a base is; two forms of one model, such as its GGUF file, differ.

    Attributes:
        kind: `hf` or `gguf`.
        name: hub id or recorded name, if any.
        config: hash of what the configuration says.
        weights: hash of every tensor's name, type and shape and 12 KiB of its bytes; empty if only
            the configuration is there.
    """

    kind: str
    name: str | None
    config: str
    weights: str


def identified(base: BaseModel) -> BaseIdentity:
    """Return which model a base is; of each tensor a few KiB are read.

    Raises:
        FormatError: if a file of it cannot be read.
    """
    facts = {key: value for key, value in base.facts.items() if key not in _PASSING}
    config = hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode())
    weights = hashlib.sha256()
    for name in sorted(base.tensors):
        tensor = base.tensors[name]
        weights.update(f"{name} {tensor.dtype.value} {list(tensor.shape)}\n".encode())
        for sample in _samples(tensor):
            weights.update(sample)
    return BaseIdentity(
        kind=base.kind,
        name=base.name,
        config=config.hexdigest()[:16],
        weights=weights.hexdigest()[:16] if base.tensors else "",
    )


def _samples(tensor: LazyTensor) -> Iterator[bytes]:
    """Yield bytes from the start, the middle and the end of a tensor that lies in a file."""
    part = tensor.read
    if isinstance(part, FileSlice):
        size = min(_BYTES, part.length)
        for place in range(_SAMPLES):
            start = (part.length - size) * place // (_SAMPLES - 1)
            yield replace(part, offset=part.offset + start, length=size)()
