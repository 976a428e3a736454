"""The models that engines serve, by class or type, read from the engines' own source.

served.json is made by fixtures/engines/make.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("served.json")
_NAMES = ("lora", "without", "tableless", "types", "types_without")


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What one engine has models for.

    Attributes:
        version: of the engine that was read; empty if nothing is known of it.
        lora: classes that it runs with adapters.
        without: classes that it runs, and takes no adapters for.
        tableless: classes of `lora` for which it takes none on `embed_tokens` and `lm_head`.
        types: values of `model_type` that it has a model for.
        types_without: those of them that it takes no adapters for.
        layers: last parts of the modules that take adapters, by `model_type`; without a row, all.
        prefix: what their paths begin with; empty if that is the class's own affair.
        rigid: of those models, the layers on which its LoRA cannot stand, by the last part of
            their names.
    """

    version: str = ""
    lora: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    tableless: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    types_without: frozenset[str] = frozenset()
    layers: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    prefix: str = ""
    rigid: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])

    def lacks_type(self, model_type: str) -> bool:
        """Tell whether the engine has no model of a type; false where one of both is unknown."""
        return bool(model_type and self.types) and model_type not in self.types

    def takes(self, model_type: str, module: str) -> bool:
        """Tell whether a module takes an adapter; true where the engine lists none of the type."""
        listed = self.layers.get(model_type)
        leaf = module.rpartition(".")[2]
        return listed is None or (leaf in listed and module.startswith(self.prefix))


@cache
def served(engine: str) -> Served:
    """Return the models of an engine; empty sets where nothing is known of it."""
    found = _lists().get(engine)
    if found is None:
        return Served()
    names = {key: frozenset(found.get(key, ())) for key in _NAMES}
    layers = {kind: frozenset(leaves) for kind, leaves in found.get("layers", {}).items()}
    rigid = {name: frozenset(layers) for name, layers in found.get("rigid", {}).items()}
    return Served(
        version=found["version"],
        layers=layers,
        prefix=found.get("prefix", ""),
        rigid=rigid,
        **names,
    )


@cache
def _lists() -> Mapping[str, Any]:
    return json.loads(_FILE.read_text(encoding="utf-8"))
