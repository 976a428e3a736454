"""The linear layers of a base that a list of target names means, and their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule
from adapterkit.errors import BaseRequiredError, IncompatibleBaseError
from adapterkit.tinylora.registration import registered

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.tensor import LazyTensor

_WEIGHT = ".weight"


def target_modules(
    base: BaseModel, targets: Collection[str], *, conv1d: bool = True
) -> tuple[str, ...]:
    """Return the linear layers whose last name component is a target, in registration order.

    Where the order of the family is not known it is that of the base's files.

    Args:
        base: the model; from its tensors, or from its config and the tables of its family.
        targets: last components of module names, compared whole.
        conv1d: whether GPT-2's Conv1D counts as linear; the ANRGUSC pack leaves it alone.
    """
    names = [name for name in _modules(base) if name.rpartition(".")[2] in targets]
    names = [name for name in names if _linear(base, name, conv1d=conv1d)]
    return tuple(registered(names, base.architecture) or names)


def _modules(base: BaseModel) -> Iterator[str]:
    if base.kind == "hf" and base.has_tensors:
        for name, tensor in base.tensors.items():
            if name.endswith(_WEIGHT) and tensor.is_matrix:
                yield name.removesuffix(_WEIGHT)
        return
    for layer in range(int(base.sizes.value("layers"))):
        for rule in base.architecture.rules:
            if "{i}" in rule.hf and not rule.stacked and rule.kind == "linear":
                stored = rule.targets[0].name.replace("{i}", str(layer)) + _WEIGHT
                if not base.has_tensors or stored in base.tensors:
                    yield rule.hf.replace("{i}", str(layer))


def _linear(base: BaseModel, name: str, *, conv1d: bool) -> bool:
    match = find_rule(base.architecture, name)
    if match is None:
        return True  # a tower beside the text model, say
    return match.rule.kind == "linear" and (conv1d or not match.rule.conv1d)


def weight_of(base: BaseModel, module: str) -> LazyTensor:
    """Return the stored weight of a module.

    Raises:
        IncompatibleBaseError: if the base has none of that name, or a quantised one.
    """
    tensor = base.tensors.get(module + _WEIGHT)
    if tensor is None or not tensor.is_matrix:
        raise IncompatibleBaseError(f"{base.path} has no such linear layer", where=module)
    if not tensor.dtype.floating or tensor.dtype.quantised or tensor.dtype.scaled:
        raise IncompatibleBaseError(
            f"its weight in {base.path} is stored as {tensor.dtype}; the weights that training saw "
            "are needed",
            where=module,
        )
    return tensor


def require_weights(base: BaseModel | None, *, path: Path, name: str | None = None) -> BaseModel:
    """Return a base whose Hugging Face weights are there, or say what to give.

    Raises:
        BaseRequiredError: if there is no base, only its config, or a GGUF file.
    """
    if base is not None and base.kind == "hf" and base.has_tensors:
        return base
    wanted = f" ({name})" if name else ""
    given = "only a config.json was given" if base else "its singular vectors are not in the file"
    if base is not None and base.kind != "hf":
        given = "a GGUF base holds other bytes than training saw"
    raise BaseRequiredError(
        f"{given}; give the Hugging Face directory of the base model{wanted} with its safetensors "
        "weights as --base",
        path=path,
    )
