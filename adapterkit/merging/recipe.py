r"""A merge as a YAML file: strict, every mistake named by its key.

    adapters:
      - path: a
        weight: 0.7
        modules: {'self_attn\..*': 0.9}
      - path: b.gguf
        weight: 0.3
    method: ties
    space: knots
    params: {density: 0.5}
    rank: 16
    out: merged

Keys are those of `Recipe`; paths are looked up beside the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.errors import FormatError
from adapterkit.tables import (
    ANY_MAPPING,
    FLAG,
    NAME,
    TEXT,
    Kind,
    Table,
    either,
    listed,
    mapped,
    number,
    one_of,
    whole,
)
from adapterkit.yaml_file import read_yaml_mapping

_NUMBER = number(spelled=True)
_NUMBERS = mapped(_NUMBER)
_LARGEST_RANK, _LARGEST_SEED = 1 << 20, 1 << 63
_SETTINGS: dict[str, Kind[Any]] = {
    "method": TEXT,
    "rank": either(whole(1, _LARGEST_RANK), one_of("auto")),
    "tol": _NUMBER,
    "energy": _NUMBER,
    "seed": whole(-_LARGEST_SEED, _LARGEST_SEED - 1),
    "space": TEXT,
    "params": _NUMBERS,
    "normalize": FLAG,
    "missing": TEXT,
    "any_base": FLAG,
}
_FILES = ("out", "to", "base", "outtype")
_ADAPTER: dict[str, Kind[Any]] = {"path": NAME, "weight": _NUMBER, "modules": _NUMBERS}
_ADAPTERS: Kind[tuple[Any, ...]] = listed(either(NAME, ANY_MAPPING), 1 << 12, 1)
_LARGEST = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A merge, as its file describes it.

    Attributes:
        sources: adapters, in order.
        settings: arguments of `merge`.
        files: arguments of `merge_files`: `out`, `to`, `base`, `outtype`.
    """

    sources: tuple[str, ...]
    settings: Mapping[str, Any]
    files: Mapping[str, str]


def read_recipe(file: Path | str) -> Recipe:
    """Read and check a recipe, a YAML file.

    Raises:
        NotFoundError: if there is no such file.
        FormatError: if it is no YAML or a key is unknown, missing, twice there or of another type;
            the message names the key.
    """
    path = Path(file)
    table = Table(read_yaml_mapping(path, largest=_LARGEST), path)
    table.only(("adapters", *_SETTINGS, *_FILES), "key")
    adapters = [
        _adapter(table, entry, f"adapters[{place}]")
        for place, entry in enumerate(table.get("adapters", _ADAPTERS))
    ]
    settings = {k: table.get(k, kind) for k, kind in _SETTINGS.items() if k in table.fields}
    weights = [adapter.get("weight") for adapter in adapters]
    if any(weight is not None for weight in weights):
        if None in weights:
            place = weights.index(None)
            raise FormatError("others have one", path=path, where=f"adapters[{place}].weight")
        settings["weights"] = weights
    if any("modules" in adapter for adapter in adapters):
        settings["module_weights"] = [adapter.get("modules", {}) for adapter in adapters]
    files = {name: table.get(name, NAME) for name in _FILES if name in table.fields}
    if "base" in files:
        files["base"] = _beside(path, files["base"])
    if "out" in files:
        files["out"] = str(path.parent / files["out"])
    sources = tuple(_beside(path, adapter["path"]) for adapter in adapters)
    return Recipe(sources=sources, settings=settings, files=files)


def _adapter(table: Table, entry: Any, where: str) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"path": entry}
    fields = table.inner(where, entry)
    fields.only(_ADAPTER, "key")
    fields.get("path", NAME)
    return {name: fields.get(name, _ADAPTER[name]) for name in fields.fields}


def _beside(path: Path, name: str) -> str:
    """Return a path as seen from the recipe's folder, or the name itself: it may be a hub id."""
    near = path.parent / name
    try:
        return str(near) if near.exists() else name
    except OSError:
        return name  # no name of a file: what opens it says so
