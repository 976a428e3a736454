"""The LoraConfig that diffusers keeps in a file's metadata; where it stands, it alone has alpha."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import FormatError
from adapterkit.patterns import Allowance, Expression, ending
from adapterkit.tables import FLAG, Table, mapped, number, whole

if TYPE_CHECKING:
    from pathlib import Path

FIELD = "lora_adapter_metadata"
_NONE: Mapping[str, Any] = MappingProxyType({})
_RANK = whole(1, 1 << 20)


class LoraConfigs:
    """The configurations of all components of a file, by the component's name in diffusers."""

    def __init__(self, metadata: Mapping[str, str], path: Path) -> None:
        """Take the metadata of a file.

        Raises:
            FormatError: if the field is no JSON object, or a setting is not what it must be.
        """
        fields: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, value in _document(metadata, path).items():
            component, _, setting = name.partition(".")
            fields[component][setting] = value
        allowance = Allowance()
        self._configs = {
            component: _Config(Table(settings, path, f"{FIELD}.{component}"), allowance)
            for component, settings in fields.items()
        }

    def of(self, component: str, module: str) -> tuple[int, float] | None:
        """Return (rank, scale) of a module; None if nothing is said of its component."""
        config = self._configs.get(component)
        return config and config.of(module)


class _Config:
    def __init__(self, table: Table, allowance: Allowance) -> None:
        self._rank = table.get("r", _RANK, 8)
        self._alpha = table.get("lora_alpha", number(), 8.0)
        self._root = table.optional("use_rslora", FLAG) or False
        self._ranks = _patterns(table.get("rank_pattern", mapped(_RANK), _NONE), allowance)
        self._alphas = _patterns(table.get("alpha_pattern", mapped(number()), _NONE), allowance)

    def of(self, module: str) -> tuple[int, float]:
        rank = _hit(self._ranks, module, self._rank)
        alpha = _hit(self._alphas, module, self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._root else rank)


def _document(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    text = metadata.get(FIELD)
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is no JSON: {error}", path=path, where=FIELD) from None
    if not isinstance(fields, dict):
        raise FormatError("is no JSON object", path=path, where=FIELD)
    return cast("dict[str, Any]", fields)


def _patterns(given: Mapping[str, Any], allowance: Allowance) -> tuple[tuple[Expression, Any], ...]:
    return tuple((ending(key, allowance), value) for key, value in given.items())


def _hit(patterns: tuple[tuple[Expression, Any], ...], module: str, usual: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.fits(module)), usual)
