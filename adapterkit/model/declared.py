"""Settings that promise tensors, and what it means that file and setting contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from adapterkit.keys import Role, TensorKey
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


def unstored(adapter: AdapterTensorSet) -> Iterator[tuple[str, str, str]]:
    """Yield (setting, modules, message) for each setting that promises what is not there."""
    for setting, modules in adapter.unstored.items():
        promise = PROMISES[setting]
        if setting == "modules_to_save":
            for module in modules:
                message = (
                    "modules_to_save names it, and the file does not hold it; save the adapter "
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
        promise = PROMISES[setting]
        keys = tuple(TensorKey(module, promise.role) for module in modules)
        message = (
            f"the file holds {promise.what}, and the config says {setting} {promise.off}: "
            f"{promise.reader} leaves them out; set {setting} to {promise.on} in its config if "
            "they were trained, or leave them out (adapterkit convert --allow-lossy)"
        )
        drops = tuple(key for key in keys if key in adapter.tensors)
        yield Loss("undeclared", first_and_more(modules, _SHOWN), message, drops)
