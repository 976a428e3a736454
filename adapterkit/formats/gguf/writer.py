"""Write a GGUF LoRA adapter in llama.cpp's names, row order and scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.containers.gguf import ValueType, array, float32, uint32, write_gguf
from adapterkit.dtype import DType
from adapterkit.factors import turned
from adapterkit.formats.gguf.engine import common_alpha, engine_adapter, folded
from adapterkit.formats.gguf.reader import ALPHA, INVOCATION_TOKENS
from adapterkit.model import GgufSource, spelled_out

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet
    from adapterkit.tensor import LazyTensor

_QUANTISATION_VERSION = 2
# What llama.cpp multiplies without crashing; other float types are widened to float32.
_STORABLE = {DType.F32, DType.F16, DType.BF16, DType.Q8_0}


def write_adapter(adapter: AdapterTensorSet, path: Path, options: FormatOptions) -> None:
    """Write a GGUF adapter.

    Args:
        adapter: what to write; parts that GGUF cannot hold have been reported as losses already.
        path: file to create.
        options: `base` for names and sizes, `dtype` for the factors (None keeps each factor's, with
            float32 where a scale had to be folded in).

    Raises:
        BaseRequiredError: if the family or a size is unknown.
    """
    adapter = spelled_out(adapter)
    engine = engine_adapter(adapter, options)
    alpha = common_alpha(engine.pairs)
    tensors: dict[str, LazyTensor] = {}
    for pair in engine.pairs:
        stored = folded(pair, alpha)
        a = turned(stored.a) if stored.embedding else stored.a
        tensors[f"{pair.module}.weight.lora_a"] = _stored(a, options.dtype)
        tensors[f"{pair.module}.weight.lora_b"] = _stored(stored.b, options.dtype)
    write_gguf(path, _metadata(adapter, engine.architecture, alpha, options, tensors), tensors)


def _stored(tensor: LazyTensor, dtype: DType | None) -> LazyTensor:
    wanted = dtype or tensor.dtype
    if wanted.quantised and tensor.shape[-1] % wanted.block:
        wanted = DType.F16  # no whole blocks in a row; reported as a remark
    return tensor.cast(wanted if wanted in _STORABLE else DType.F32)


def _metadata(
    adapter: AdapterTensorSet,
    architecture: str,
    alpha: float,
    options: FormatOptions,
    tensors: Mapping[str, LazyTensor],
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        ALPHA: float32(alpha),
    }
    if tokens := adapter.invocation_tokens:
        metadata[INVOCATION_TOKENS] = array(ValueType.UINT32, list(tokens))
    metadata |= _base_model(adapter, options)
    if any(tensor.dtype.quantised for tensor in tensors.values()):
        metadata["general.quantization_version"] = uint32(_QUANTISATION_VERSION)
    # What a GGUF source said beside this (its name, tags, licence) is passed on.
    source = adapter.source
    return {**(source.metadata if isinstance(source, GgufSource) else {}), **metadata}


def _base_model(adapter: AdapterTensorSet, options: FormatOptions) -> dict[str, Any]:
    """Return `general.base_model.*`, so that a reader can tell what the adapter belongs to."""
    base = options.base
    name = adapter.base.name or (base.name if base else None)
    identity = dict(base.identity) if base else {}
    if not name and not identity:
        return {}
    fields: dict[str, str] = {}
    if name and _is_hub_id(name):
        organization, _, short = name.partition("/")
        fields["name"] = short.replace("-", " ")
        fields["organization"] = organization
        fields["repo_url"] = f"https://huggingface.co/{name}"
    else:
        fields = {key: identity[key] for key in _KNOWN if key in identity}
        fields.setdefault("name", name.rstrip("/").rpartition("/")[2] if name else "")
    prefix = "general.base_model.0."
    return {
        "general.base_model.count": uint32(1),
        **{prefix + key: value for key, value in fields.items() if value},
    }


_KNOWN = ("name", "organization", "version", "repo_url")


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
