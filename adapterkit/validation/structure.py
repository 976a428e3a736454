"""Findings about an adapter alone: pairing, ranks, shapes, names, config against tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from adapterkit.model import AdapterTensorSet, Role, TensorKey
from adapterkit.patterns import compiled
from adapterkit.validation.findings import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adapterkit.tensor import LazyTensor

_PARTNERS = {
    Role.LORA_A: Role.LORA_B,
    Role.LORA_B: Role.LORA_A,
    Role.EMBEDDING_A: Role.EMBEDDING_B,
    Role.EMBEDDING_B: Role.EMBEDDING_A,
}
_MATRIX = 2


def check_structure(adapter: AdapterTensorSet) -> Iterator[Finding]:
    """Yield every structural finding; no tensor data is read."""
    for key, tensor in adapter.tensors.items():
        yield from _tensor(adapter, key, tensor)
    yield from _declared_ranks(adapter)
    yield from _clean_ups(adapter)
    config = adapter.extras.get("peft", {}).get("config", {})
    if config:
        yield from _targets(adapter, config)
        yield from _overlaps(adapter, config)


def _error(code: str, module: str | None, message: str, hint: str = "") -> Finding:
    return Finding(code, Severity.ERROR, module, message, hint)


def _tensor(adapter: AdapterTensorSet, key: TensorKey, tensor: LazyTensor) -> Iterator[Finding]:
    name, shape = str(key), list(tensor.shape)
    if not tensor.size:
        hint = "gather sharded parameters before saving (ZeRO-3, FSDP) and save again"
        yield _error("AK103", name, f"is empty, shape {shape}", hint)
        return
    if not tensor.dtype.floating:
        yield _error("AK104", name, f"holds {tensor.dtype} values, not real numbers")
    partner = _PARTNERS.get(key.role)
    if partner is None:
        return
    other = adapter.tensors.get(TensorKey(key.module, partner))
    if len(shape) < _MATRIX:
        yield _error("AK105", name, f"has shape {shape}, not that of a factor")
    elif other is None:
        yield _error("AK101", name, f"has no {partner} beside it", "save the adapter again")
    elif key.role in {Role.LORA_A, Role.EMBEDDING_A} and len(other.shape) >= _MATRIX:
        matrices = shape[-2] == other.shape[-1] and tuple(shape[:-2]) == other.shape[:-2]
        convolution = len(shape) == len(other.shape) > _MATRIX and shape[0] == other.shape[1]
        if other.size and not (matrices or convolution):
            shapes = f"A is {shape}, B is {list(other.shape)}"
            yield _error("AK102", key.module, f"ranks disagree, {shapes}")


def _declared_ranks(adapter: AdapterTensorSet) -> Iterator[Finding]:
    conflicts: Mapping[str, list[int]] = adapter.traits.get("rank_conflicts", {})
    for module, (declared, stored) in conflicts.items():
        message = f"the config declares rank {declared}, the tensors have {stored}"
        yield _error("AK106", module, message, "declare it in rank_pattern, with its alpha")


def _clean_ups(adapter: AdapterTensorSet) -> Iterator[Finding]:
    """Report names that had to be cleaned up: other programs look for the clean ones."""
    for note in adapter.provenance.notes if adapter.provenance else ():
        if "tensor name" in note and "left out" not in note:
            hint = "convert it to peft: names are written clean"
            yield Finding("AK110", Severity.WARNING, None, note, hint, fix="strip-prefix")


def _targets(adapter: AdapterTensorSet, config: Mapping[str, Any]) -> Iterator[Finding]:
    declared = config.get("target_modules")
    modules = [pair.module for pair in adapter.pairs() if len(pair.a.shape) == _MATRIX]
    if not isinstance(declared, list) or not modules:
        return
    targets = [str(name) for name in cast("list[Any]", declared)]
    for target in targets:
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            message = f"target_modules names {target}, and no tensor is of it"
            yield Finding("AK107", Severity.WARNING, None, message)
    for module in modules:
        if not any(module == t or module.endswith(f".{t}") for t in targets):
            message = "has factors, but target_modules does not name it: PEFT leaves them out"
            yield _error("AK108", module, message, "add it to target_modules")


def _overlaps(adapter: AdapterTensorSet, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Report modules that two patterns claim: PEFT sorts patterns when it saves."""
    modules = [pair.module for pair in adapter.pairs()]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = config.get(field) or {}
        if list(patterns) == sorted(patterns) and len(patterns) < _MATRIX:
            continue
        ready = [(key, value, compiled(key)) for key, value in patterns.items()]
        for module in modules:
            hits = [(key, value) for key, value, pattern in ready if pattern.match(module)]
            if len({value for _, value in hits}) > 1:
                shown = ", ".join(f"{key} = {value}" for key, value in hits)
                message = f"{field} has several answers ({shown}); the first counts, and PEFT "
                hint = "anchor the patterns, so that each module has one"
                message += "sorts them when it saves"
                yield Finding("AK109", Severity.WARNING, module, message, hint)
                break
