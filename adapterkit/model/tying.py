"""One update of a tied table: stored once in the model, spelled out where names are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.keys import Role, TensorKey

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from adapterkit.model.adapter import AdapterTensorSet
    from adapterkit.tensor import LazyTensor

# A table is read by rows and written as (vocabulary, width): (B · A)ᵀ = Aᵀ · Bᵀ.
_TURNED = {Role.EMBEDDING_A: Role.LORA_B, Role.EMBEDDING_B: Role.LORA_A}
_WEIGHT = ".weight"


def spelled_out(adapter: AdapterTensorSet) -> AdapterTensorSet:
    """Return a copy in which every name of a tied update has tensors of its own."""
    if not any(adapter.tied.values()):
        return adapter.replace(tied={}) if adapter.tied else adapter
    tensors, scales, tokens = dict(adapter.tensors), dict(adapter.scales), adapter.token_indices
    for table, names in adapter.tied.items():
        for name in names:
            tensors.update(_under(adapter, table, name))
            if table in scales:
                scales[name] = scales[table]
            if not isinstance(tokens, tuple) and (rows := adapter.tokens_of(table)):
                tokens = {**tokens, name: rows}
    return adapter.replace(tensors=tensors, scales=scales, token_indices=tokens, tied={})


def one_spelling(
    adapters: Sequence[AdapterTensorSet],
) -> tuple[list[AdapterTensorSet], Mapping[str, tuple[str, ...]]]:
    """Return adapters that spell tied updates alike, and what is tied in all of them.

    An adapter without any update of a tied table agrees with those that have one.
    """
    tied: dict[str, tuple[str, ...]] = {}
    for adapter in adapters:
        tied |= adapter.tied
    if all(_agrees(adapter, tied) for adapter in adapters):
        return list(adapters), tied
    return [spelled_out(adapter) for adapter in adapters], {}


def _agrees(adapter: AdapterTensorSet, tied: Mapping[str, tuple[str, ...]]) -> bool:
    trained = {module_of(key) for key in adapter.tensors if key.role is not Role.BASE_COPY}
    return all(
        adapter.tied.get(table) == names or not trained & {table, *names}
        for table, names in tied.items()
    )


def module_of(key: TensorKey) -> str:
    """Return the module of a tensor: that of a whole weight, too."""
    return key.module.removesuffix(_WEIGHT) if key.role is Role.FULL else key.module


def twin(key: TensorKey, name: str) -> TensorKey | None:
    """Return the key that a tensor of a tied embedding has under the output's name, if any."""
    if key.role is Role.FULL:
        return TensorKey(name + _WEIGHT, Role.FULL)
    role = _TURNED.get(key.role, key.role)
    return TensorKey(name, role) if key.role in {*_TURNED, Role.TOKEN_ROWS} else None


def under_another_name(key: TensorKey, tensor: LazyTensor) -> LazyTensor:
    """Return what a tensor of a tied embedding is under the output's name."""
    if key.role not in _TURNED:
        return tensor
    return tensor.map(lambda values: values.T, shape=tensor.shape[::-1])


def _under(
    adapter: AdapterTensorSet, table: str, name: str
) -> Iterator[tuple[TensorKey, LazyTensor]]:
    for key, tensor in adapter.tensors.items():
        other = twin(key, name) if module_of(key) == table else None
        if other is not None:
            yield other, under_another_name(key, tensor)
