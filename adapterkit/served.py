"""The models that engines serve, by class or type, read from the engines' own source.

served.json is made by fixtures/engines/make.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("served.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What one engine has models for.

    Attributes:
        version: of the engine that was read; empty if nothing is known of it.
        lora: classes that it runs with adapters.
        without: classes that it runs, and takes no adapters for.
        types: values of `model_type` that it has a model for.
        rigid: of those models, the layers on which its LoRA cannot stand, by the last part of
            their names.
    """

    version: str = ""
    lora: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    rigid: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])

    def lacks_type(self, model_type: str) -> bool:
        """Tell whether the engine has no model of a type; false where one of both is unknown."""
        return bool(model_type and self.types) and model_type not in self.types


@cache
def served(engine: str) -> Served:
    """Return the models of an engine; empty sets where nothing is known of it."""
    found = json.loads(_FILE.read_text(encoding="utf-8")).get(engine)
    if found is None:
        return Served()
    rigid = {name: frozenset(layers) for name, layers in found.pop("rigid", {}).items()}
    names = {key: frozenset(value) for key, value in found.items() if key != "version"}
    return Served(version=found["version"], rigid=rigid, **names)
