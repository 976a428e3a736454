"""What a file of a diffusion LoRA cannot hold, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.base.copies import lost_copies
from adapterkit.dtype import DType
from adapterkit.formats.diffusion.plan import planned
from adapterkit.keys import Role, TensorKey
from adapterkit.model import Kind
from adapterkit.model.beside import lost_beside
from adapterkit.model.declared import undeclared
from adapterkit.model.losses import lost_columns, lost_settings, lost_tensors, tensors_of
from adapterkit.notes import Loss, first_and_more

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.formats.diffusion.plan import Plan
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet

_OTHERS = {
    Role.FULL: ("saved-module", "a whole trained parameter has no place in a LoRA file"),
    Role.TOKEN_ROWS: ("token-rows", "trained token rows have no place in a LoRA file"),
    Role.EMBEDDING_A: ("embedding", "LoRA on an embedding has no place in a LoRA file"),
    Role.EMBEDDING_B: ("embedding", "LoRA on an embedding has no place in a LoRA file"),
}


def losses(adapter: AdapterTensorSet, options: FormatOptions, spelling: str) -> list[Loss]:
    """List every reason at once; no tensor data is read."""
    plan = planned(adapter, spelling, base=options.base)
    found = [
        *lost_settings(adapter),
        *_by_role(adapter),
        *lost_copies(adapter, options.base),
        *_misplaced(adapter, plan),
    ]
    found += [*_by_kind(adapter), *_partly(adapter, plan), *_by_spelling(adapter, spelling)]
    found += [*undeclared(adapter), *lost_beside(adapter.beside)]
    if options.dtype is DType.Q8_0:
        message = "LoRA files of diffusion models hold f32, f16 or bf16; choose with --outtype"
        found.append(Loss("quantised", "q8_0", message))
    return found


def _by_role(adapter: AdapterTensorSet) -> Iterator[Loss]:
    for role, (code, message) in _OTHERS.items():
        if keys := [key for key in adapter.tensors if key.role is role]:
            yield lost_tensors(code, keys, f"{message}; merge the adapter into the base instead")


def _misplaced(adapter: AdapterTensorSet, plan: Plan) -> Iterator[Loss]:
    reasons: dict[str, list[str]] = {}
    for module, why in plan.misplaced.items():
        reasons.setdefault(why, []).append(module)
    for why, modules in reasons.items():
        yield lost_tensors("no-such-module", tensors_of(adapter, modules), why)


def _by_kind(adapter: AdapterTensorSet) -> Iterator[Loss]:
    stacks = [module for module, kind in adapter.kinds.items() if kind is Kind.EXPERTS]
    if stacks:
        message = "stacked experts have no place in a LoRA file of a diffusion model"
        yield lost_tensors("experts", tensors_of(adapter, stacks), message)


def _partly(adapter: AdapterTensorSet, plan: Plan) -> Iterator[Loss]:
    """Name DoRA of some parts of what is one module in the file: the others have no magnitude."""
    for members in plan.fused().values():
        row = members[0][1].row
        parts = len(row.shares) if row else 1
        by_column = [TensorKey(module, Role.COLUMN_MAGNITUDE) for module, _ in members]
        if parts > 1 and (by_column := [key for key in by_column if key in adapter.tensors]):
            message = "DoRA by column has the norm of all rows of a layer, which is fused there"
            yield lost_tensors(
                "dora-columns", by_column, f"{message}; merge it into its base instead"
            )
        keys = [TensorKey(module, Role.MAGNITUDE) for module, _ in members]
        keys = [key for key in keys if key in adapter.tensors]
        if keys and len(keys) < parts:
            message = f"it is one of {parts} parts of a fused layer, and not all are DoRA"
            modules = [key.module for key in keys]
            yield lost_tensors("dora-partly", tensors_of(adapter, modules), message)


def _by_spelling(adapter: AdapterTensorSet, spelling: str) -> Iterator[Loss]:
    biases = [key for key in adapter.tensors if key.role is Role.LORA_BIAS]
    if spelling == "kohya" and biases:
        message = "kohya's scripts read no bias; write comfyui or diffusers"
        yield lost_tensors("lora-bias", biases, message)
    if spelling == "diffusers":
        yield from lost_columns(adapter)
    magnitudes = [key for key in adapter.tensors if key.role is Role.MAGNITUDE]
    if spelling == "comfyui" and magnitudes:
        names = first_and_more([key.module for key in magnitudes])
        message = "DoRA is written exactly, but ComfyUI divides by the norm of the base alone"
        yield Loss("dora", names, message, blocks=False)
