"""What an MLX adapter cannot hold, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.advice import MERGE, MERGE_INSTEAD, MERGE_UNTIED, OR_LEAVE_OUT
from adapterkit.architectures.mapping import in_tower
from adapterkit.base.copies import lost_copies
from adapterkit.base.heads import foreign_parameters, lost_biases, lost_heads
from adapterkit.dtype import DType
from adapterkit.factors import turned
from adapterkit.formats.mlx import spelling
from adapterkit.formats.mlx.writer import MLXAdapter, mlx_adapter
from adapterkit.keys import Role
from adapterkit.model import Kind, Update, spelled_out
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
from adapterkit.served import served

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet

_MERGED = f"{MERGE_INSTEAD}, and convert that with mlx_lm.convert; {OR_LEAVE_OUT}"
_OUTPUT = "lm_head"
# Relative error below which two updates of one table are one, computed twice in float32.
_SAME = 1e-6

# What mlx-lm does with models of a type, so that no adapter for them is written: falcon_h1.py and
# minimax_m3_vl.py of mlx_lm/models, in sanitize.
_UNWRITTEN = {
    "falcon_h1": "multiplies the weights of falcon_h1 when it loads them, and no adapter",
    "minimax_m3_vl": "has modules of other names for MiniMax M3, which are not written",
    "minimax_m3_vl_text": "has modules of other names for MiniMax M3, which are not written",
}
_ROLES: Mapping[Role, tuple[str, str]] = {
    Role.TOKEN_ROWS: ("token-rows", f"trained token rows have no place there; {MERGE_INSTEAD}"),
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
        "layers are replicated; MLX-LM has one block for each; merge in PEFT first",
    ),
    "invocation_tokens": (
        "alora",
        "it acts only after its invocation tokens; MLX-LM would apply it to every token",
    ),
}


def losses(adapter: AdapterTensorSet, options: FormatOptions) -> list[Loss]:
    """List every reason at once; no tensor data is read but that of two updates of one table."""
    if unserved := [*_unserved(options.base)]:
        return unserved  # whatever else there is, no model of it is there to load it
    adapter = spelled_out(adapter)
    mapped = mlx_adapter(adapter, options.base)
    found = [*_by_role(adapter, options.base), *_by_setting(adapter), *_unplaced(adapter, mapped)]
    found += [*_dora(adapter), *_embeddings(adapter, options.base), *lost_metadata(adapter)]
    found += [*undeclared(adapter), *lost_beside(adapter.beside)]
    found += [*_rigid(adapter, options.base)]
    if options.dtype is DType.Q8_0:
        message = "MLX adapters hold f32, f16 or bf16; choose one with --outtype"
        found.append(Loss("quantised", "q8_0", message))
    return found


def _unserved(base: BaseModel | None) -> Iterator[Loss]:
    models = served("mlx")
    if base and models.lacks_type(base.model_type):
        message = f"mlx-lm {models.version} has no model of this type; {MERGE_INSTEAD}"
        yield Loss("unserved", f"model_type {base.model_type}", message)


def _rigid(adapter: AdapterTensorSet, base: BaseModel | None) -> Iterator[Loss]:
    # Of a wrapper these are the facts of its text tower, whose layers mlx-lm has of its own.
    kind = str(base.facts.get("model_type") or "") if base else ""
    if reason := _UNWRITTEN.get(kind):
        yield lost_tensors("unwritten", [*adapter.tensors], f"mlx-lm {reason}; {MERGE_INSTEAD}")
    layers = served("mlx").rigid.get(kind, frozenset())
    if found := [p.module for p in adapter.pairs() if p.module.rpartition(".")[2] in layers]:
        reason = "in mlx-lm it is no layer that takes LoRA, and the file would not load"
        message = f"{reason}; {MERGE_INSTEAD}"
        yield lost_tensors("rigid", tensors_of(adapter, found), message)


def _by_role(adapter: AdapterTensorSet, base: BaseModel | None) -> Iterator[Loss]:
    yield from lost_roles(adapter, _ROLES)
    yield from lost_biases(adapter, base, "an MLX adapter")
    foreign = foreign_parameters(adapter, base)
    yield from lost_heads(foreign, ", and convert that with mlx_lm.convert")
    full = [key for key in adapter.tensors if key.role is Role.FULL]
    if kept := [key for key in full if key not in foreign]:
        message = f"a whole trained parameter has no place there; {_MERGED}"
        yield lost_tensors("saved-module", kept, message)
    yield from lost_columns(adapter)
    yield from lost_copies(adapter, base)


def _by_setting(adapter: AdapterTensorSet) -> Iterator[Loss]:
    yield from lost_named_settings(adapter, _SETTINGS)
    yield from lost_layout(adapter)


def _unplaced(adapter: AdapterTensorSet, mapped: MLXAdapter) -> Iterator[Loss]:
    if mapped.unknown:
        message = "MLX-LM's name for it depends on the model; give the base with --base"
        yield lost_tensors("needs-base", tensors_of(adapter, mapped.unknown), message, drop=False)
    for module, reason in mapped.stranded.items():
        yield lost_tensors("experts", tensors_of(adapter, [module]), reason)
    towers = [pair.module for pair in adapter.pairs() if in_tower(pair.module)]
    if towers:
        message = f"belongs to a vision or audio tower, which MLX-LM leaves out; {MERGE_INSTEAD}"
        yield lost_tensors("tower", tensors_of(adapter, towers), message)
    convolutions = [pair.module for pair in adapter.pairs() if pair.kind is Kind.CONVOLUTION]
    if convolutions:
        message = f"MLX-LM adapts no convolutions; {MERGE_INSTEAD}"
        yield lost_tensors("convolution", tensors_of(adapter, convolutions), message)


def _dora(adapter: AdapterTensorSet) -> Iterator[Loss]:
    having = [key for key in adapter.tensors if key.role is Role.MAGNITUDE]
    if not having:
        return
    modules = {key.module for key in having}
    without = [pair.module for pair in adapter.pairs() if pair.module not in modules]
    if without:
        message = "fine_tune_type dora holds for all modules, and this one has no magnitude"
        yield lost_tensors("dora-partly", tensors_of(adapter, without), message)
    tables = [pair.module for pair in adapter.pairs() if pair.embedding and pair.module in modules]
    if tables:
        reason = "MLX normalises an embedding's DoRA for every token, PEFT for every dimension"
        yield lost_tensors(
            "dora-embedding", tensors_of(adapter, tables), f"{reason}; {MERGE_INSTEAD}"
        )
    experts = [
        pair.module
        for pair in adapter.pairs()
        if pair.module in modules and (pair.kind is Kind.EXPERTS or spelling.expert_of(pair.module))
    ]
    if experts:
        yield lost_tensors(
            "dora-experts",
            tensors_of(adapter, experts),
            f"MLX has no DoRA of experts; {MERGE_INSTEAD}",
        )


def _embeddings(adapter: AdapterTensorSet, base: BaseModel | None) -> Iterator[Loss]:
    tables = [key for key in adapter.tensors if key.role is Role.EMBEDDING_A]
    outputs = tensors_of(adapter, [_OUTPUT])
    tied = base.tied if base else None
    if tables and tied is None:
        message = "MLX applies it to the output too if the two are tied; give the base with --base"
        yield lost_tensors("needs-base", tensors_of(adapter, [tables[0].module]), message)
    elif tables and tied and not outputs:
        reason = "MLX applies it to the tied output too, which this adapter leaves alone"
        message = f"{reason}; {MERGE_UNTIED}"
        yield lost_tensors("tied-embedding", tensors_of(adapter, [tables[0].module]), message)
    elif outputs and tied and not tables:
        message = f"MLX-LM has no output module where it is tied to the embedding; {MERGE_UNTIED}"
        yield lost_tensors("tied-output", outputs, message)
    elif outputs and tied and not _one_update(adapter, tables[0].module):
        message = (
            f"MLX-LM has one table for this and {tables[0].module}, whose update is another one; "
            f"give each a table of its own instead ({MERGE} --tied untie)"
        )
        yield Loss(
            "tied-apart", _OUTPUT, message, (*tensors_of(adapter, [tables[0].module]), *outputs)
        )


def _one_update(adapter: AdapterTensorSet, table: str) -> bool:
    """Tell whether the output's update is that of the embedding, as far as float32 tells.

    What is not finite is left for the proof, which names the tensor.
    """
    from adapterkit.lowrank.differences import difference

    if any(key.role is Role.MAGNITUDE for key in tensors_of(adapter, [table, _OUTPUT])):
        return False
    pairs = {pair.module: pair for pair in adapter.pairs() if pair.module in {table, _OUTPUT}}
    if len(pairs) < len({table, _OUTPUT}):
        return False
    own, output = pairs[table], pairs[_OUTPUT]
    shared = Update(_OUTPUT, turned(own.b), turned(own.a), own.scale)
    if (shared.kind, shared.shape) != (output.kind, output.shape):
        return False
    return not difference(shared, output).relative_error > _SAME
