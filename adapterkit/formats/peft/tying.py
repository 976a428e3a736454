"""PEFT's `ensure_weight_tying`: one update of a tied table under the names of all its modules.

PEFT 0.21 trains the factors of the embedding and stores them for the output too, turned; a whole
table, or rows of tokens, as they are. Loaded, all of them are one parameter again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.keys import EMBEDDING_FACTORS, FACTORS, Role, TensorKey
from adapterkit.model.tying import module_of, twin, under_another_name
from adapterkit.tensor import same_bits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.lora_config.config import LoraConfig
    from adapterkit.tensor import LazyTensor

    Tensors = Mapping[TensorKey, LazyTensor]

_OF_AN_OUTPUT = frozenset({*FACTORS, Role.TOKEN_ROWS, Role.FULL})
# Embeddings that PEFT ties by name, whether or not the file has their update twice.
_TIED_BY_NAME = "embed_tokens"
_OUTPUTS = ("lm_head", "output", "embed_out")


def tied_tables(tensors: Tensors, config: LoraConfig) -> dict[str, tuple[str, ...]]:
    """Return the tied embeddings, each with the modules that its update is stored for as well.

    Only what is the same to the bit, with the same scale, is one update; nothing is tied without
    the setting.
    """
    found: dict[str, tuple[str, ...]] = {}
    if not config.flag("ensure_weight_tying"):
        return found
    chosen = [module for module, role in _tables(tensors, config).items() if role is Role.FULL]
    modules = [m for m in dict.fromkeys(map(module_of, tensors)) if m not in chosen]
    second: set[str] = set()
    for table, role in _tables(tensors, config).items():
        if table in second:
            continue
        names = tuple(m for m in modules if m != table and _same(tensors, config, table, m))
        alone = not any(map(_is_output, modules))
        by_name = table.rpartition(".")[2] == _TIED_BY_NAME
        if names or role is Role.TOKEN_ROWS or (by_name and alone):
            found[table] = names
            second.update(names)
    return found


def folded(tensors: Tensors, tied: Mapping[str, tuple[str, ...]]) -> dict[TensorKey, LazyTensor]:
    """Return the tensors without those that are stored a second time; frozen copies stay."""
    second = {name for names in tied.values() for name in names}
    return {
        key: tensor
        for key, tensor in tensors.items()
        if key.role is Role.BASE_COPY or module_of(key) not in second
    }


def _tables(tensors: Tensors, config: LoraConfig) -> dict[str, Role]:
    """Return the modules that are trained as embeddings, or saved whole by the config's choice."""
    chosen = config.names("modules_to_save")
    found: dict[str, Role] = {}
    for key, tensor in tensors.items():
        module = module_of(key)
        named = any(f".{module}".endswith(f".{name}") for name in chosen)
        whole = key.role is Role.FULL and tensor.is_matrix
        table = key.role in EMBEDDING_FACTORS or (whole and named)
        if table or (key.role is Role.TOKEN_ROWS and not _is_output(module)):
            found[module] = key.role
    return found


def _is_output(module: str) -> bool:
    return module.rpartition(".")[2].startswith(_OUTPUTS)


def _same(tensors: Tensors, config: LoraConfig, table: str, module: str) -> bool:
    """Tell whether all that a module has is the embedding's update under its name."""
    mine = {key: t for key, t in tensors.items() if module_of(key) == table and _trained(key)}
    others = {key: t for key, t in tensors.items() if module_of(key) == module and _trained(key)}
    if not others or not {key.role for key in others} <= _OF_AN_OUTPUT:
        return False
    expected = {twin(key, module): under_another_name(key, t) for key, t in mine.items()}
    if expected.keys() != others.keys():
        return False
    factors = any(key.role in FACTORS for key in others)
    if factors and config.scale_of(table) != config.scale_of(module):
        return False
    return all(same_bits(expected[key], tensor) for key, tensor in others.items())


def _trained(key: TensorKey) -> bool:
    return key.role is not Role.BASE_COPY
