"""What a PEFT LoraConfig says of the tensors beside it.

Field meanings and defaults are those of PEFT 0.21.2; a field that this module does not know has no
effect on tensors there, or is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.patterns import compiled

# Initialisations that subtract something from the base: B · A alone is not the update.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Settings with which a LoRA is not a constant update of a weight, by field.
_NOT_A_WEIGHT_UPDATE = {
    "arrow_config": "Arrow routes every token through its own mix of adapters",
    "kasa_config": "KaSA changes the base weights and multiplies by a diagonal",
}


_Patterns = tuple[tuple[re.Pattern[str], Any], ...]


@dataclass(frozen=True)
class LoraConfig:
    """An adapter_config.json of peft_type LORA, field types checked.

    Attributes:
        raw: the whole document, in file order.
        path: the file, for messages.
    """

    raw: Mapping[str, Any]
    path: Path

    def __post_init__(self) -> None:
        kind = self.raw.get("peft_type", "LORA")
        if kind != "LORA":
            raise UnsupportedError(
                f"peft_type {kind} is not LORA; `adapterkit formats` lists what is read",
                path=self.path,
            )
        for name, reason in _NOT_A_WEIGHT_UPDATE.items():
            if self.raw.get(name):
                raise UnsupportedError(f"{name}: {reason}; it is not read", path=self.path)

    @cached_property
    def rank(self) -> int:
        """Default rank `r`."""
        return self._rank("r", self.raw.get("r", 8))

    @cached_property
    def alpha(self) -> float:
        """Default `lora_alpha`."""
        return self._number("lora_alpha", self.raw.get("lora_alpha", 8))

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(r) instead of alpha / r."""
        return self.flag("use_rslora")

    def flag(self, name: str) -> bool:
        """Return a boolean field, false when absent or null."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise FormatError(f"{name} is {value!r}, not true or false", path=self.path)
        return bool(value)

    def rank_of(self, module: str) -> int:
        """Return the rank of a module: the first hit of rank_pattern, in file order, or `r`."""
        return self._first_hit(self._ranks, self._looked_up(module), self.rank)

    def scale_of(self, module: str) -> float:
        """Return the effective scale of a module; rank and alpha patterns are looked up apart."""
        rank = self.rank_of(module)
        alpha = self._first_hit(self._alphas, self._looked_up(module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def is_parameter(self, module: str) -> bool:
        """Tell whether a module's weight is adapted through `target_parameters`."""
        name = f".{module}.weight"
        return any(name.endswith(f".{target}") for target in self._parameters)

    @cached_property
    def _parameters(self) -> tuple[str, ...]:
        return self.names("target_parameters")

    def _looked_up(self, module: str) -> str:
        """Return the name that patterns are matched with: a bare parameter's own."""
        return f"{module}.weight" if self.is_parameter(module) else module

    @cached_property
    def _ranks(self) -> tuple[tuple[re.Pattern[str], int], ...]:
        return tuple(
            (self._pattern(key), self._rank(f"rank_pattern[{key!r}]", value))
            for key, value in self.mapping("rank_pattern").items()
        )

    @cached_property
    def _alphas(self) -> tuple[tuple[re.Pattern[str], float], ...]:
        return tuple(
            (self._pattern(key), self._number(f"alpha_pattern[{key!r}]", value))
            for key, value in self.mapping("alpha_pattern").items()
        )

    @staticmethod
    def _first_hit(
        patterns: tuple[tuple[re.Pattern[str], Any], ...], module: str, usual: Any
    ) -> Any:
        return next((value for pattern, value in patterns if pattern.match(module)), usual)

    def _pattern(self, key: str) -> re.Pattern[str]:
        try:
            return compiled(key)
        except ValueError as error:
            raise FormatError(f"pattern {key!r} {error}", path=self.path) from None

    def mapping(self, name: str) -> dict[str, Any]:
        """Return a field that holds an object, empty when absent or null."""
        value: Any = self.raw.get(name)
        if value and not isinstance(value, dict):
            raise FormatError(f"{name} is not an object", path=self.path)
        return cast("dict[str, Any]", value or {})

    def names(self, name: str) -> tuple[str, ...]:
        """Return a field that holds one or several names, empty when absent or null."""
        value = self.raw.get(name) or ()
        if isinstance(value, str):
            return (value,)
        if isinstance(value, (list, tuple)):
            return tuple(str(item) for item in cast("list[Any]", value))
        raise FormatError(f"{name} is not a list of names", path=self.path)

    def _rank(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FormatError(f"{name} is {value!r}, not a whole number from 1", path=self.path)
        return value

    def _number(self, name: str, value: Any) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise FormatError(f"{name} is {value!r}, not a finite number", path=self.path)
        return value
