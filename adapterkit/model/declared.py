"""Settings that promise tensors, and what it means that file and setting contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from adapterkit.keys import EMBEDDING_FACTORS, FACTORS, Role, TensorKey
from adapterkit.notes import Loss, first_and_more

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adapterkit.model.adapter import AdapterTensorSet

_SHOWN = 3
# What `pooled_inputs` are without a base.
UNDECIDED = (
    "PEFT pools its inputs (use_qalora) on a GPTQ base and leaves that aside on any other; give "
    "the base with --base"
)


@dataclass(frozen=True, slots=True)
class Promise:
    """What a setting says that the file holds.

    Attributes:
        role: what the tensors do.
        what: what they are, in the plural.
        off: the value of the setting with which nothing is promised.
        on: a value with which they are.
        reader: the program that goes by the setting.
    """

    role: Role
    what: str
    off: str
    on: str = "true"
    reader: str = "PEFT"


PROMISES: Mapping[str, Promise] = MappingProxyType(
    {
        "use_dora": Promise(Role.MAGNITUDE, "DoRA magnitudes", "false"),
        "fine_tune_type": Promise(Role.MAGNITUDE, "DoRA magnitudes", "lora", "dora", "mlx-lm"),
        "lora_bias": Promise(Role.LORA_BIAS, "biases on B", "false"),
        "bias": Promise(Role.FULL, "trained biases", "none", "all"),
        "modules_to_save": Promise(Role.FULL, "whole weights", "null", "a list"),
        "trainable_token_indices": Promise(
            Role.TOKEN_ROWS, "trained token rows", "null", "the list of their tokens"
        ),
    }
)
# All that PEFT and mlx-lm make for a module that they adapt.
_OF_ADAPTED = (
    *FACTORS,
    *EMBEDDING_FACTORS,
    Role.MAGNITUDE,
    Role.COLUMN_MAGNITUDE,
    Role.LORA_BIAS,
)


@dataclass(frozen=True, slots=True)
class Selector:
    """What a setting that chooses the adapted modules does to the factors of all others.

    Attributes:
        remedy: how to choose them after all.
        reader: what is done by the program that goes by the setting.
    """

    remedy: str
    reader: str = "PEFT leaves them out"


_MLX = "mlx-lm refuses the file"
SELECTORS: Mapping[str, Selector] = MappingProxyType(
    {
        "exclude_modules": Selector("take them out of exclude_modules"),
        "modules_to_save": Selector("take them out of modules_to_save"),
        "target_modules": Selector("name them in target_modules"),
        "layers_to_transform": Selector("add their layers to layers_to_transform"),
        "num_layers": Selector("set num_layers to -1", _MLX),
        "keys": Selector("add them to keys of lora_parameters", _MLX),
    }
)


def denied(setting: str, module: str) -> tuple[TensorKey, ...]:
    """Return the tensors of a module that a setting of `undeclared` denies."""
    roles = _OF_ADAPTED if setting in SELECTORS else (PROMISES[setting].role,)
    return tuple(TensorKey(module, role) for role in roles)


def what_is_denied(setting: str) -> str:
    """Return what the tensors are that a setting of `undeclared` denies, in the plural."""
    return f"modules that {setting} leaves out" if setting in SELECTORS else PROMISES[setting].what


def unstored(adapter: AdapterTensorSet) -> Iterator[tuple[str, str, str]]:
    """Yield (setting, modules, message) for each setting that promises what is not there."""
    for setting, modules in adapter.unstored.items():
        promise = PROMISES[setting]
        if setting == "modules_to_save":
            for module in modules:
                message = (
                    "modules_to_save promises it, and the file does not hold it; save the adapter "
                    "again, or take it out of modules_to_save"
                )
                yield setting, module, message
            continue
        message = (
            f"{setting} promises {promise.what}, and the file holds none; save the adapter again "
            f"with them, or set {setting} to {promise.off} if none were trained"
        )
        yield setting, first_and_more(modules, _SHOWN), message


def undeclared(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Yield a loss for each kind of tensor that the file holds and its config says it has not.

    What it is equal to depends on who reads it, so that nobody may choose but the user: setting
    the config right keeps them, and `allow_lossy` leaves them out.
    """
    for setting, modules in adapter.undeclared.items():
        drops = [key for module in modules for key in denied(setting, module)]
        message = (
            f"{_contradiction(setting)} if they were trained, or leave them out "
            "(adapterkit convert SRC -o DIR --allow-lossy)"
        )
        drops = tuple(key for key in drops if key in adapter.tensors)
        yield Loss("undeclared", first_and_more(modules, _SHOWN), message, drops)


def _contradiction(setting: str) -> str:
    """Return what is the case, what becomes of the tensors, and how to keep them."""
    if chosen := SELECTORS.get(setting):
        return (
            f"the file holds factors, and {setting} in the config does not select them: "
            f"{chosen.reader}; {chosen.remedy}"
        )
    promise = PROMISES[setting]
    return (
        f"the file holds {promise.what}, and the config says {setting} {promise.off}: "
        f"{promise.reader} leaves them out; set {setting} to {promise.on} in its config"
    )
