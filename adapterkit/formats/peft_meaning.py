"""Settings of a LoraConfig that change what its tensors mean, as fields of the neutral model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import FormatError
from adapterkit.formats.peft_config import BASE_CHANGING_INITS

if TYPE_CHECKING:
    from adapterkit.formats.peft_config import LoraConfig

_NUMBERS = "a list of whole numbers"


def meaning(config: LoraConfig) -> dict[str, Any]:
    """Return fields of AdapterTensorSet.

    Raises:
        FormatError: if a setting is of another type.
    """
    init = config.raw.get("init_lora_weights")
    changes = isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS)
    return {
        "initialisation": init if changes else None,
        "layer_replication": tuple(
            _numbers(config, "layer_replication", each, 2)
            for each in _list(config, "layer_replication")
        ),
        "invocation_tokens": _numbers(
            config, "alora_invocation_tokens", _list(config, "alora_invocation_tokens")
        ),
        "token_indices": _token_indices(config),
    }


def _token_indices(config: LoraConfig) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    name = "trainable_token_indices"
    if isinstance(config.raw.get(name), dict):
        found = config.mapping(name).items()
        return {module: _numbers(config, f"{name}[{module!r}]", rows) for module, rows in found}
    return _numbers(config, name, _list(config, name))


def _list(config: LoraConfig, name: str) -> list[Any]:
    value: Any = config.raw.get(name) or []
    if not isinstance(value, (list, tuple)):
        raise FormatError(f"{name} is {value!r}, not a list", path=config.path)
    return list(cast("list[Any]", value))


def _numbers(
    config: LoraConfig, name: str, value: Any, count: int | None = None
) -> tuple[int, ...]:
    numbers = cast("list[Any]", value) if isinstance(value, (list, tuple)) else None
    whole = numbers is not None and all(type(number) is int for number in numbers)
    if numbers is None or not whole or count not in {None, len(numbers)}:
        wanted = _NUMBERS if count is None else f"{count} whole numbers each"
        raise FormatError(f"{name} has {value!r}, not {wanted}", path=config.path)
    return tuple(numbers)
