"""What a PEFT LoraConfig says of the tensors beside it.

Field meanings and defaults are those of PEFT 0.21.2; a field that this module does not know has no
effect on tensors there, or is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from adapterkit.errors import UncheckableError, UnsupportedError
from adapterkit.patterns import Allowance, Expression, ending
from adapterkit.tables import (
    ANY_MAPPING,
    FLAG,
    TEXT,
    Kind,
    Table,
    either,
    listed,
    mapped,
    number,
    shown,
    whole,
)

# Initialisations that subtract something from the base: B · A alone is not the update.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Settings with which a LoRA is not a constant update of a weight, by field.
_NOT_A_WEIGHT_UPDATE = {
    "arrow_config": "Arrow routes every token through its own mix of adapters",
    "kasa_config": "KaSA changes the base weights and multiplies by a diagonal",
}

_T = TypeVar("_T")
LARGEST_RANK = 1 << 20
_RANK = whole(1, LARGEST_RANK)
# `target_modules` of an adapter without factors: an empty list would mean PEFT's own choice.
NO_TARGETS = "dummy-target-modules"
_NAMES = either(TEXT, listed(TEXT))
_NUMBERS = listed(whole(0, 1 << 40))
# What later steps take from the document as it is: it is checked once, here.
SELECTING: dict[str, Kind[Any]] = {
    "target_modules": _NAMES,
    "modules_to_save": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": either(whole(0, 1 << 20), listed(whole(0, 1 << 20))),
}
_TAKEN: dict[str, Kind[Any]] = {
    **SELECTING,
    "target_parameters": _NAMES,
    "layer_replication": listed(listed(whole(0, 1 << 20), 2, 2), 1 << 12),
    "init_lora_weights": either(FLAG, TEXT),
    "alora_invocation_tokens": _NUMBERS,
    "trainable_token_indices": either(_NUMBERS, mapped(_NUMBERS)),
    "bias": TEXT,
}


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
            name = kind if isinstance(kind, str) else shown(kind)
            raise UnsupportedError(
                f"peft_type {name[:80]} is not LORA; `adapterkit list formats` lists what is read",
                path=self.path,
            )
        for name, reason in _NOT_A_WEIGHT_UPDATE.items():
            if self.raw.get(name):
                raise UnsupportedError(f"{name}: {reason}; it is not read", path=self.path)
        for name, kind in _TAKEN.items():
            self._given(name, kind, None)

    @cached_property
    def fields(self) -> Table:
        """The document, to be asked field by field."""
        return Table(self.raw, self.path)

    @cached_property
    def rank(self) -> int:
        """Default rank `r`."""
        return self.fields.get("r", _RANK, 8)

    @cached_property
    def alpha(self) -> float:
        """Default `lora_alpha`."""
        return self.fields.get("lora_alpha", number(), 8.0)

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(r) instead of alpha / r."""
        return self.flag("use_rslora")

    def flag(self, name: str) -> bool:
        """Return a boolean field, false when absent or null."""
        return self.fields.optional(name, FLAG) or False

    def rank_of(self, module: str) -> int:
        """Return the rank of a module: the first hit of rank_pattern, in file order, or `r`.

        Raises:
            FormatError: if a pattern before the first hit cannot be evaluated.
        """
        return self._first_hit("rank_pattern", self._ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the effective scale of a module; rank and alpha patterns are looked up apart.

        Raises:
            FormatError: if a pattern before the first hit cannot be evaluated.
        """
        rank = self.rank_of(module)
        alpha = self._first_hit("alpha_pattern", self._alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def is_parameter(self, module: str) -> bool:
        """Tell whether a module's weight is adapted through `target_parameters`."""
        name = f".{module}.weight"
        return any(name.endswith(f".{target}") for target in self._parameters)

    @cached_property
    def _parameters(self) -> tuple[str, ...]:
        return self.names("target_parameters")

    @cached_property
    def _allowance(self) -> Allowance:
        return Allowance()

    @cached_property
    def _ranks(self) -> tuple[tuple[Expression, int], ...]:
        return tuple(
            (ending(key, self._allowance), rank)
            for key, rank in self._given("rank_pattern", mapped(_RANK), {}).items()
        )

    @cached_property
    def _alphas(self) -> tuple[tuple[Expression, float], ...]:
        return tuple(
            (ending(key, self._allowance), alpha)
            for key, alpha in self._given("alpha_pattern", mapped(number()), {}).items()
        )

    def _first_hit(
        self,
        name: str,
        patterns: tuple[tuple[Expression, Any], ...],
        module: str,
        usual: Any,
    ) -> Any:
        # A bare parameter is looked up by its own name.
        found = f"{module}.weight" if self.is_parameter(module) else module
        try:
            return next((value for pattern, value in patterns if pattern.fits(found)), usual)
        except UncheckableError as error:
            raise self.fields.error(name, f"{error.message}; the scale depends on it") from None

    def mapping(self, name: str) -> Table:
        """Return a field that holds an object, empty when absent, null or false."""
        return self.fields.inner(name, self._given(name, ANY_MAPPING, {}))

    def names(self, name: str) -> tuple[str, ...]:
        """Return a field that holds one or several names, empty when absent or null."""
        if isinstance(value := self.raw.get(name), str):
            return (value,) if value else ()
        return self._given(name, listed(TEXT), ())

    def _given(self, name: str, kind: Kind[_T], usual: _T) -> _T:
        """Return a field, or what PEFT takes null, false and every empty value for."""
        return self.fields.get(name, kind) if self.raw.get(name) else usual
