"""What an `.onnx_adapter` cannot hold, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.advice import MERGE_INSTEAD, OR_LEAVE_OUT
from adapterkit.base.copies import lost_copies
from adapterkit.base.heads import foreign_parameters, lost_biases, lost_heads
from adapterkit.containers.onnx_adapter import MAX_BYTES
from adapterkit.dtype import DType
from adapterkit.formats.onnx.writer import STORABLE
from adapterkit.keys import Role, is_one_expert
from adapterkit.model import Kind, OnnxSource, spelled_out
from adapterkit.model.beside import lost_beside
from adapterkit.model.declared import UNDECIDED, undeclared
from adapterkit.model.losses import (
    lost_columns,
    lost_layout,
    lost_metadata,
    lost_named_settings,
    lost_roles,
    lost_tensors,
    tensors_of,
)
from adapterkit.notes import Loss

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet

_MERGE = f"{MERGE_INSTEAD}, and export that"
_OF_EXPERTS = "a graph has no inputs for LoRA on experts"
_ROLES: Mapping[Role, tuple[str, str]] = {
    Role.MAGNITUDE: ("dora", f"DoRA magnitudes are no inputs of a graph with LoRA; {_MERGE}"),
    Role.TOKEN_ROWS: ("token-rows", f"trained token rows have no place there; {_MERGE}"),
}
_KINDS: Mapping[Kind, tuple[str, str]] = {
    Kind.EMBEDDING: ("embedding", f"a graph has no inputs for LoRA on an embedding; {_MERGE}"),
    Kind.EXPERTS: ("experts", f"{_OF_EXPERTS}; {_MERGE}"),
    Kind.CONVOLUTION: ("convolution", f"a graph has no inputs for LoRA on it; {_MERGE}"),
}
_SETTINGS: Mapping[str, tuple[str, str]] = {
    "initialisation": (
        "base-changing-init",
        (
            "this initialisation changed the base, so B · A is no update of the original one; give "
            "the original base with --base, or save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        ),
    ),
    "pooled_inputs": ("qalora", UNDECIDED),
    "layer_replication": (
        "layer-replication",
        "layers are replicated; a graph has inputs for each block of the base; merge in PEFT first",
    ),
    "invocation_tokens": (
        "alora",
        "it acts only after its invocation tokens; a graph would apply it to every token",
    ),
}
# More than a parameter takes beside its name and data.
_OVERHEAD = 256


def losses(adapter: AdapterTensorSet, options: FormatOptions) -> list[Loss]:
    """List every reason at once; no tensor data is read."""
    adapter = spelled_out(adapter)
    found = [*_by_role(adapter, options.base), *_by_kind(adapter), *_by_setting(adapter)]
    found += [*undeclared(adapter), *lost_beside(adapter.beside), *_too_large(adapter, options)]
    found += lost_metadata(adapter)
    if name := adapter.base.name:
        found.append(Loss("base", name, "is not recorded in an .onnx_adapter", blocks=False))
    if options.dtype is DType.Q8_0:
        message = "an .onnx_adapter holds f32, f16 or bf16; choose one with --outtype"
        found.append(Loss("quantised", "q8_0", message))
    return found


def _by_role(adapter: AdapterTensorSet, base: BaseModel | None) -> Iterator[Loss]:
    yield from lost_roles(adapter, _ROLES)
    yield from lost_biases(adapter, base, "an .onnx_adapter")
    foreign = foreign_parameters(adapter, base)
    yield from lost_heads(foreign, ", and export that")
    full = [key for key in adapter.tensors if key.role is Role.FULL]
    if kept := [key for key in full if key not in foreign]:
        message = f"a whole trained parameter has no place there; {_MERGE}; {OR_LEAVE_OUT}"
        yield lost_tensors("saved-module", kept, message)
    yield from lost_columns(adapter)
    yield from lost_copies(adapter, base)


def _by_kind(adapter: AdapterTensorSet) -> Iterator[Loss]:
    for kind, (code, message) in _KINDS.items():
        modules = {pair.module for pair in adapter.pairs() if pair.kind is kind}
        if keys := tensors_of(adapter, modules):
            yield lost_tensors(code, keys, message)
    given = set(adapter.source.names if isinstance(adapter.source, OnnxSource) else ())
    single = {pair.module for pair in adapter.pairs() if is_one_expert(pair.module)} - given
    if keys := tensors_of(adapter, single):
        yield lost_tensors("experts", keys, f"{_OF_EXPERTS}; {_MERGE}")


def _by_setting(adapter: AdapterTensorSet) -> Iterator[Loss]:
    yield from lost_named_settings(adapter, _SETTINGS)
    yield from lost_layout(adapter)


def _too_large(adapter: AdapterTensorSet, options: FormatOptions) -> Iterator[Loss]:
    stored = options.dtype or DType.F32
    size = (stored if stored in STORABLE else DType.F32).block_bytes
    sizes = (
        size * tensor.size + len(str(key)) + _OVERHEAD for key, tensor in adapter.tensors.items()
    )
    if (total := sum(sizes)) > MAX_BYTES:
        message = (
            f"onnxruntime takes files of at most {MAX_BYTES} bytes; store halves (--outtype f16), "
            "or take a smaller rank (adapterkit compress SRC -o DST --rank N)"
        )
        yield Loss("too-large", f"{total} bytes", message)
