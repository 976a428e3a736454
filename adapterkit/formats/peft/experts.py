"""Experts in PEFT files: `target_parameters`, whose one name has had three layouts.

For a parameter of E experts PEFT folds the experts into the rank: row e · r + k of A and column
k · E + e of B belong to expert e. Which of A and B holds the inputs changed: up to 0.18 A has the
parameter's second-last axis, 0.19.0 turned that around for modules that declare `is_transposed`,
and from 0.19.1 it is turned around for all others. Where input and output widths differ, shapes
tell; where they are equal, the version and the model class must.

A router that is a bare matrix is reached the same way, as `...gate.weight`; its factors are those
of a linear layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.factors import turned
from adapterkit.keys import Role, TensorKey
from adapterkit.lora_config.config import LoraConfig
from adapterkit.model import Kind, PeftSource
from adapterkit.tables import TEXT
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adapterkit.architectures import Architecture, WeightRule
    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet

# PEFT wraps the parameters of a module in the order in which the module declares them, the first
# one innermost; these are the orders of transformers' expert modules.
_DECLARED = ("gate_up_proj", "up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_WEIGHT = "weight"
_NESTED = re.compile(r"^(?P<module>.+?)(?P<depth>(?:\.base_layer)*)$")
# The release whose layout is written, for readers that must know it.
WRITTEN_VERSION = "0.21.2"


@dataclass(frozen=True)
class _Wrapped:
    parameter: str
    a: LazyTensor
    b: LazyTensor


def unfold_experts(
    tensors: Mapping[TensorKey, LazyTensor], config: LoraConfig, base: BaseModel | None
) -> tuple[dict[TensorKey, LazyTensor], set[str]]:
    """Replace folded expert factors by (E, r, in) and (E, out, r), named by their parameter.

    Returns the tensors, and the names of those stacks.

    Args:
        tensors: as read, expert modules still spelled `...experts` and `...experts.base_layer`.
        config: for `target_parameters`, ranks and the PEFT version.
        base: the model, if known.

    Raises:
        FormatError: if nesting and `target_parameters` disagree, or a rank does not divide.
        UnsupportedError: if nothing tells which factor holds the inputs.
    """
    patterns = config.names("target_parameters")
    if not patterns:
        return dict(tensors), set()
    groups: dict[str, dict[int, str]] = defaultdict(dict)
    for key in tensors:
        nested = _NESTED.match(key.module)
        if key.role is Role.LORA_A and nested and _targeted(nested["module"], patterns):
            groups[nested["module"]][nested["depth"].count(".base_layer")] = key.module
    rest = dict(tensors)
    wrapped: dict[str, list[_Wrapped]] = {}
    for module, levels in groups.items():
        names = _parameters(module, patterns, len(levels), config)
        wrapped[module] = []
        for depth, stored in levels.items():
            a = rest.pop(TensorKey(stored, Role.LORA_A))
            b = rest.pop(TensorKey(stored, Role.LORA_B), None)
            if b is None:
                raise FormatError("has no lora_B beside it", path=config.path, where=stored)
            wrapped[module].append(_Wrapped(names[len(levels) - 1 - depth], a, b))
    widths, stacks = _widths(rest), set[str]()
    for module, members in wrapped.items():
        for member in members:
            name = module if member.parameter == _WEIGHT else f"{module}.{member.parameter}"
            a, b = member.a, member.b
            if not _is_matrix(name, member, config):
                swapped = _swapped(name, member, members, widths, config, base)
                a, b = _unfolded(name, member, config)
                a, b = (turned(b), turned(a)) if swapped else (a, b)
                stacks.add(name)
            rest[TensorKey(name, Role.LORA_A)] = a
            rest[TensorKey(name, Role.LORA_B)] = b
    return rest, stacks


def fold_experts(adapter: AdapterTensorSet, base: BaseModel | None) -> dict[TensorKey, LazyTensor]:
    """Undo `unfold_experts`: name experts as PEFT nests them, in the layout of 0.19.1 and later."""
    tensors = adapter.tensors
    groups: dict[str, list[str]] = defaultdict(list)
    for key in tensors:
        if key.role is Role.LORA_A and adapter.kind_of(key) is Kind.EXPERTS:
            module, parameter = _owner(adapter, key.module, base)
            groups[module].append(parameter)
    stacks = {_joined(module, each) for module, names in groups.items() for each in names}
    folded = {key: tensor for key, tensor in tensors.items() if key.module not in stacks}
    for module, parameters in groups.items():
        ordered = sorted(parameters, key=_declared_place)
        for place, parameter in enumerate(ordered):
            nesting = ".base_layer" * (len(ordered) - 1 - place)
            name = _joined(module, parameter)
            a, b = tensors[TensorKey(name, Role.LORA_A)], tensors[TensorKey(name, Role.LORA_B)]
            if _stored_swapped(adapter, name, base):
                a, b = turned(b), turned(a)
            folded[TensorKey(module + nesting, Role.LORA_A)] = _fold_a(a)
            folded[TensorKey(module + nesting, Role.LORA_B)] = _fold_b(b)
    return folded


def wrapped_parameters(adapter: AdapterTensorSet, base: BaseModel | None) -> dict[str, str]:
    """Return module -> parameter path for what PEFT reaches through `target_parameters` only.

    Those are stacks of experts, and matrices that transformers 5 holds without a Linear around
    them, unless the adapter spells experts one by one, as transformers 4 did.
    """
    one_by_one = any(_has_layout(base, pair.module, "experts") for pair in adapter.pairs())
    found: dict[str, str] = {}
    for pair in adapter.pairs():
        bare = _is_parameter(adapter, pair.module, base)
        if pair.kind is Kind.EXPERTS:
            found[pair.module] = ".".join(_owner(adapter, pair.module, base))
        elif bare and not one_by_one:
            found[pair.module] = f"{pair.module}.{_WEIGHT}"
    return found


def _joined(module: str, parameter: str) -> str:
    return module if parameter == _WEIGHT else f"{module}.{parameter}"


def _owner(adapter: AdapterTensorSet, name: str, base: BaseModel | None) -> tuple[str, str]:
    """Split a stack's name into its module and the parameter there."""
    if _is_parameter(adapter, name, base):
        return name, _WEIGHT
    module, _, parameter = name.rpartition(".")
    return module, parameter


def _is_parameter(adapter: AdapterTensorSet, module: str, base: BaseModel | None) -> bool:
    """Tell whether a module's weight is a bare parameter: its config says it, or else the base."""
    config = _source(adapter)
    if config and (config.is_parameter(module) or config.names("target_modules")):
        return config.is_parameter(module)
    return _is_bare(base, module)


def _source(adapter: AdapterTensorSet) -> LoraConfig | None:
    """Return the settings that the adapter was read with, if it was read from PEFT."""
    source = adapter.source
    raw = source.config if isinstance(source, PeftSource) else None
    return LoraConfig(raw, Path()) if raw else None


def _is_bare(base: BaseModel | None, module: str) -> bool:
    from adapterkit.architectures.mapping import find_rule
    from adapterkit.base.spelling import Spelling

    if base is None or base.expert_layout != "fused":
        return False
    if match := find_rule(base.architecture, module):
        return match.rule.bare
    cls = Spelling(base).cls
    return cls is not None and cls.kind(f"{module}.{_WEIGHT}") == "bare"


def _has_layout(base: BaseModel | None, module: str, layout: str) -> bool:
    from adapterkit.architectures.mapping import find_rule

    match = find_rule(base.architecture, module) if base else None
    return bool(match and match.rule.layout == layout)


def _is_matrix(name: str, member: _Wrapped, config: LoraConfig) -> bool:
    return member.parameter == _WEIGHT and member.a.shape[0] == config.rank_of(name)


def _targeted(module: str, patterns: Iterable[str]) -> bool:
    return any(_names(pattern, module) for pattern in patterns)


def _names(pattern: str, module: str) -> bool:
    """Tell whether a target parameter belongs to this module: whole components, from the end.

    A name alone belongs to any module that has such a parameter. PEFT writes it when it finds
    targets of transformers 4, and the module that it means is called `experts` everywhere.
    """
    parent = pattern.rpartition(".")[0] or "experts"
    return f".{module}".endswith(f".{parent}")


def _declared_place(parameter: str) -> tuple[int, str]:
    place = _DECLARED.index(parameter) if parameter in _DECLARED else len(_DECLARED)
    return place, parameter


def _parameters(
    module: str, patterns: tuple[str, ...], levels: int, config: LoraConfig
) -> list[str]:
    """Return the wrapped parameters of a module, innermost first."""
    names = {p.rpartition(".")[2] for p in patterns if _names(p, module)}
    unknown = sorted(names - set(_DECLARED))
    if len(names) != levels or (levels > 1 and unknown):
        shown = ", ".join(sorted(names))
        raise FormatError(
            f"has {levels} nested pairs for the target_parameters {shown}; cannot tell which is "
            "which",
            path=config.path,
            where=module,
        )
    return sorted(names, key=_declared_place)


def _unfolded(name: str, member: _Wrapped, config: LoraConfig) -> tuple[LazyTensor, LazyTensor]:
    rank, rows, columns = config.rank_of(name), member.a.shape[0], member.b.shape[1]
    if rows % rank or rows != columns:
        raise FormatError(
            f"A has {rows} rows and B {columns} columns, not a multiple of rank {rank} each",
            path=config.path,
            where=name,
        )
    experts, inputs, outputs = rows // rank, member.a.shape[1], member.b.shape[0]
    a = member.a.map(lambda x: x.reshape(experts, rank, inputs), shape=(experts, rank, inputs))
    b = member.b.map(
        lambda x: x.reshape(outputs, rank, experts).transpose(2, 0, 1),
        shape=(experts, outputs, rank),
    )
    return a, b


def _fold_a(a: LazyTensor) -> LazyTensor:
    experts, rank, inputs = a.shape
    return a.map(lambda x: x.reshape(-1, inputs), shape=(experts * rank, inputs))


def _fold_b(b: LazyTensor) -> LazyTensor:
    experts, outputs, rank = b.shape
    return b.map(
        lambda x: x.transpose(1, 2, 0).reshape(outputs, -1), shape=(outputs, rank * experts)
    )


def _swapped(
    name: str,
    member: _Wrapped,
    siblings: list[_Wrapped],
    widths: frozenset[int],
    config: LoraConfig,
    base: BaseModel | None,
) -> bool:
    """Tell whether A holds the outputs instead of the inputs."""
    first, second = member.a.shape[1], member.b.shape[0]
    rule, sizes = _rule(name, config, base)
    if first != second:
        if rule and sizes and (expected := _expected(rule, sizes)):
            return (first, second) == expected
        if (told := _by_siblings(member, siblings, widths)) is not None:
            return told
    return _by_version(name, rule, config)


def _expected(rule: WeightRule, sizes: Any) -> tuple[int, ...] | None:
    values = [sizes.get(text, 0) for text in rule.shape]
    return tuple(values) if values and all(isinstance(v, int) for v in values) else None


def _by_siblings(member: _Wrapped, siblings: list[_Wrapped], widths: frozenset[int]) -> bool | None:
    """Infer from widths that only the residual stream has: gate and up read it, down writes it."""
    first, second = member.a.shape[1], member.b.shape[0]
    reads = member.parameter != "down_proj"
    for sibling in siblings:
        if sibling is not member and {member.parameter, sibling.parameter} >= {"down_proj"}:
            shared = {first, second} & {sibling.a.shape[1], sibling.b.shape[0]}
            if len(shared) == 1:
                return (first in shared) != reads
    if (first in widths) != (second in widths):
        return (first in widths) != reads
    return None


def _widths(tensors: Mapping[TensorKey, LazyTensor]) -> frozenset[int]:
    """Return the input widths of q, k and v: the width of the residual stream."""
    return frozenset(
        tensor.shape[-1]
        for key, tensor in tensors.items()
        if key.role is Role.LORA_A and key.module.endswith((".q_proj", ".k_proj", ".v_proj"))
    )


def _by_version(name: str, rule: WeightRule | None, config: LoraConfig) -> bool:
    version = _version(config)
    if version is None or rule is None:
        known = "no PEFT version" if version is None else "no base model"
        raise UnsupportedError(
            f"input and output widths do not tell which factor is which, and {known} is known; "
            "give the base model with --base, or re-save the adapter with PEFT 0.19.1 or later",
            path=config.path,
            where=name,
        )
    if version >= (0, 19, 1):
        return rule.stored_turned and not rule.declares_turned
    if version >= (0, 19, 0):
        return True if not rule.stored_turned else rule.declares_turned
    return not rule.stored_turned


def _version(config: LoraConfig) -> tuple[int, ...] | None:
    text = config.fields.optional("peft_version", TEXT)
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", text) if text else None
    return tuple(int(part) for part in found.groups()) if found else None


def _rule(name: str, config: LoraConfig, base: BaseModel | None) -> tuple[WeightRule | None, Any]:
    from adapterkit.architectures.mapping import find_rule

    for architecture in tuple(base.candidates) if base else _recorded(config):
        if match := find_rule(architecture, name):
            return match.rule, base.sizes if base else None
    return None, None


def _recorded(config: LoraConfig) -> tuple[Architecture, ...]:
    """Return the families of the model class that the adapter was trained on, if it says so."""
    from adapterkit.architectures import find

    recorded = config.mapping("auto_mapping").optional("base_model_class", TEXT)
    return find(recorded) if recorded else ()


def _stored_swapped(adapter: AdapterTensorSet, name: str, base: BaseModel | None) -> bool:
    config = _source(adapter) or LoraConfig({}, Path())
    rule, _ = _rule(name, config, base)
    return bool(rule and rule.stored_turned and not rule.declares_turned)
