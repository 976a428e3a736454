"""What a LoraConfig promises and the file lacks, and what the file holds and it denies.

Found with PEFT 0.21.2: magnitudes, biases on B and token rows are made by their setting alone, so
that stored ones without it are left out in silence and missing ones stay as they were initialised.
Saved modules and trained biases are loaded whatever the config says. Factors are loaded where the
config selects the module, by the names of PEFT's own base model.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import UncheckableError
from adapterkit.keys import EMBEDDING_FACTORS, FACTORS, Role
from adapterkit.lora_config.selection import Selection
from adapterkit.notes import Note, NoteKind
from adapterkit.tables import TEXT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from adapterkit.base import BaseModel
    from adapterkit.keys import TensorKey
    from adapterkit.lora_config.config import LoraConfig

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FLAGS = {"use_dora": Role.MAGNITUDE, "lora_bias": Role.LORA_BIAS}
_EMBEDDING = "embed_tokens"
# PEFT adds both to modules_to_save of a classifier, of which a model has one.
_HEADS = {"classifier", "score"}
_CLASSIFIERS = {"SEQ_CLS", "TOKEN_CLS"}


def contradictions(
    config: LoraConfig, keys: Collection[TensorKey], base: BaseModel | None
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the fields `unstored` and `undeclared` of AdapterTensorSet.

    Args:
        config: as it was read.
        keys: what the file holds.
        base: the model, if known: what it does not have cannot be missing.
    """
    missing, denied = dict(_missing_of_flags(config, keys)), dict(_denied_by_flags(config, keys))
    if lost := _unsaved(config, keys, base):
        missing["modules_to_save"] = lost
    if lost := untrained_biases(config.raw.get("bias") or "none", keys, base):
        missing["bias"] = lost
    rows = _modules(keys, Role.TOKEN_ROWS)
    declared: object = config.raw.get("trainable_token_indices")
    if rows and not declared:
        denied["trainable_token_indices"] = rows
    if lost := _untrained_rows(declared, rows):
        missing["trainable_token_indices"] = lost
    return {"unstored": missing, "undeclared": denied}


def unselected(
    config: Mapping[str, Any], modules: Iterable[str]
) -> tuple[dict[str, tuple[str, ...]], tuple[Note, ...]]:
    """Return the modules whose factors PEFT would not load, by the field that denies them.

    What could not be evaluated is not denied; a note says so. With `ensure_weight_tying` PEFT
    adapts what is tied to an adapted table as well, and nothing outside of layers is denied.

    Args:
        config: the document; `SELECTING` fields are of their kinds.
        modules: those that have factors, but for the parameters that `target_parameters` selects.
    """
    chosen = Selection(config)
    found: dict[str, list[str]] = {}
    try:
        for module in modules:
            if config.get("ensure_weight_tying") and not _NUMBER.search(module):
                continue
            if field := chosen.denied_by(module):
                found.setdefault(field, []).append(module)
    except UncheckableError as error:
        text = f"which modules the config selects is unchecked: {error.message}"
        return {}, (Note(text, NoteKind.UNSELECTED),)
    return {field: tuple(names) for field, names in found.items()}, ()


def adapted(keys: Iterable[TensorKey]) -> tuple[str, ...]:
    """Return the modules that have factors."""
    return _modules(keys, *FACTORS, *EMBEDDING_FACTORS)


def _untrained_rows(declared: object, rows: Collection[str]) -> tuple[str, ...]:
    """Return the names whose token rows are not stored; of tied tables PEFT stores one for all."""
    if not isinstance(declared, dict):
        return (_EMBEDDING,) if declared and not _ends(_EMBEDDING, rows) else ()
    tokens = cast("dict[str, list[int]]", declared)
    stored = [numbers for name, numbers in tokens.items() if _ends(name, rows)]
    return tuple(
        name for name, numbers in tokens.items() if not _ends(name, rows) and numbers not in stored
    )


def _ends(name: str, modules: Collection[str]) -> bool:
    """Tell whether a name is that of one of the modules; a list of tokens is of any embedding."""
    if name == _EMBEDDING:
        return bool(modules)
    return any(f".{module}".endswith(f".{name}") for module in modules)


def _modules(keys: Iterable[TensorKey], *roles: Role) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.module for key in keys if key.role in roles))


def _missing_of_flags(
    config: LoraConfig, keys: Collection[TensorKey]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for flag, role in _FLAGS.items():
        having = set(_modules(keys, role))
        without = tuple(module for module in adapted(keys) if module not in having)
        if config.flag(flag) and without:
            yield flag, without


def _denied_by_flags(
    config: LoraConfig, keys: Collection[TensorKey]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for flag, role in _FLAGS.items():
        having = _modules(keys, role)
        if having and not config.flag(flag):
            yield flag, having


def _unsaved(
    config: LoraConfig, keys: Collection[TensorKey], base: BaseModel | None
) -> tuple[str, ...]:
    saved = _modules(keys, Role.FULL)
    held = {name for name in config.names("modules_to_save") if _among(name, saved)}
    missing = [name for name in config.names("modules_to_save") if name not in held]
    if base is not None and base.kind == "hf" and base.names:
        whole = (name for name in missing if _among(name, base.names))
        return (*whole, *_other_layers(held, saved, base))
    if config.fields.optional("task_type", TEXT) in _CLASSIFIERS and held & _HEADS:
        missing = [name for name in missing if name not in _HEADS]
    return tuple(missing)


def _other_layers(names: Collection[str], saved: Collection[str], base: BaseModel) -> Iterator[str]:
    """Yield parameters of the base that a name stands for too, where other layers' are saved.

    Layers past those of the model, which checkpoints have for predicting further tokens, are none.
    """
    kinds = {_NUMBER.sub("#", parameter) for parameter in saved}
    depth = base.sizes.get("layers")
    for parameter in base.names:
        number = _NUMBER.search(parameter)
        within = number is not None and (depth is None or int(number[0]) < depth)
        if not within or parameter in saved or _NUMBER.sub("#", parameter) not in kinds:
            continue
        if any(_among(name, (parameter,)) for name in names):
            yield parameter


def _among(name: str, parameters: Collection[str]) -> bool:
    return any(name in each.split(".") or f".{name}." in f".{each}." for each in parameters)


def untrained_biases(
    bias: object, keys: Collection[TensorKey], base: BaseModel | None
) -> tuple[str, ...]:
    """Return biases that `bias` says were trained and that are not stored: PEFT keeps the base's.

    Where the base is unknown, those of adapted modules whose like in another layer has one.
    """
    if bias == "none":
        return ()
    stored = {key.module for key in keys if key.role is Role.FULL and key.module.endswith(".bias")}
    own = dict.fromkeys(f"{module}.bias" for module in _modules(keys, *FACTORS))
    kinds = {_NUMBER.sub("#", name) for name in stored}
    having = [name for name in own if _NUMBER.sub("#", name) in kinds]
    if base is not None and base.kind == "hf" and base.names:
        having = list(_live_biases(base))
        if stored and stored.isdisjoint(having):
            return ()  # the file is of a class that spells them otherwise
    return tuple(n for n in having if n not in stored and (bias == "all" or n in own))


def _live_biases(base: BaseModel) -> Iterator[str]:
    """Yield the biases of a model as its class names them; layers past its last are none of it."""
    from adapterkit.base.places import Places  # with the families' tables, which `inspect` spares

    places, depth = Places(base), base.sizes.get("layers")
    for name in base.names:
        module, _, parameter = name.rpartition(".")
        number = _NUMBER.search(name)
        beyond = number is not None and depth is not None and int(number[0]) >= depth
        if parameter == "bias" and not beyond:
            yield f"{places.spelling.memory(module)}.bias"
