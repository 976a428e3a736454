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
from typing import Any, cast

from adapterkit.errors import FormatError
from adapterkit.storage import read_document

# key -> what its value must be
_SETTINGS: dict[str, str] = {
    "method": "text",
    "rank": "rank",
    "tol": "number",
    "energy": "number",
    "seed": "whole number",
    "space": "text",
    "params": "numbers",
    "normalize": "flag",
    "missing": "text",
    "any_base": "flag",
}
_FILES: dict[str, str] = {
    "out": "text",
    "to": "text",
    "base": "text",
    "outtype": "text",
}
_ADAPTER = {"path": "text", "weight": "number", "modules": "numbers"}
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


def read_recipe(path: Path | str) -> Recipe:
    """Read and check a recipe.

    Raises:
        NotFoundError: if there is no such file.
        FormatError: if it is no YAML or a key is unknown, missing, twice there or of another type;
            the message names the key.
    """
    path = Path(path)
    document = _document(path)
    unknown = [key for key in document if key not in {"adapters", *_SETTINGS, *_FILES}]
    if unknown:
        known = ", ".join(("adapters", *_SETTINGS, *_FILES))
        raise FormatError(f"unknown key; known are {known}", path=path, where=str(unknown[0]))
    adapters = [
        _fields(entry, f"adapters[{place}]", path)
        for place, entry in enumerate(_list(document.get("adapters"), path))
    ]
    settings = {k: _value(v, _SETTINGS[k], k, path) for k, v in document.items() if k in _SETTINGS}
    weights = [adapter.get("weight") for adapter in adapters]
    if any(weight is not None for weight in weights):
        if None in weights:
            place = weights.index(None)
            raise FormatError("others have one", path=path, where=f"adapters[{place}].weight")
        settings["weights"] = weights
    if any("modules" in adapter for adapter in adapters):
        settings["module_weights"] = [adapter.get("modules", {}) for adapter in adapters]
    files = {k: _value(v, _FILES[k], k, path) for k, v in document.items() if k in _FILES}
    if "base" in files:
        files["base"] = _beside(path, files["base"])
    if "out" in files:
        files["out"] = str(path.parent / files["out"])
    sources = tuple(_beside(path, adapter["path"]) for adapter in adapters)
    return Recipe(sources=sources, settings=settings, files=files)


def _document(path: Path) -> dict[str, Any]:
    import yaml

    data = read_document(path, _LARGEST)
    try:
        value = yaml.safe_load(data)
        twice = _twice(cast("Any", yaml).compose(data, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise FormatError(f"is not readable YAML ({reason})", path=path) from None
    if twice:
        raise FormatError("is there twice", path=path, where=twice)
    if not isinstance(value, dict):
        raise FormatError("is not a mapping of keys to values", path=path)
    return cast("dict[str, Any]", value)


def _twice(node: Any) -> str | None:
    """Return a key that a mapping of the document has twice: YAML lets the last one win."""
    if node is None or isinstance(node.value, str):
        return None
    seen: set[str] = set()
    for child in node.value:
        pair = cast("tuple[Any, Any]", child) if isinstance(child, tuple) else (None, child)
        name, value = getattr(pair[0], "value", None), pair[1]
        if isinstance(name, str):
            if name in seen:
                return name
            seen.add(name)
        if found := _twice(value):
            return found
    return None


def _list(value: Any, path: Path) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise FormatError("must list the adapters to merge", path=path, where="adapters")
    return cast("list[Any]", value)


def _fields(entry: Any, where: str, path: Path) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"path": entry}
    if not isinstance(entry, dict):
        raise FormatError("is neither a path nor a mapping", path=path, where=where)
    fields = cast("dict[str, Any]", entry)
    for key in fields:
        if key not in _ADAPTER:
            known = ", ".join(_ADAPTER)
            raise FormatError(f"unknown key; known are {known}", path=path, where=f"{where}.{key}")
    if "path" not in fields:
        raise FormatError("is missing", path=path, where=f"{where}.path")
    return {k: _value(v, _ADAPTER[k], f"{where}.{k}", path) for k, v in fields.items()}


def _value(value: Any, kind: str, where: str, path: Path) -> Any:
    """Return a value of the wanted kind, or refuse it by its key."""
    match kind, value:
        case "flag", bool():
            return value
        case "text", str():
            return value
        case "rank", "auto":
            return value
        case "whole number" | "rank", int() if not isinstance(value, bool):
            return value
        case "number", _ if (number := _number(value)) is not None:
            return number
        case "numbers", dict():
            mapping = cast("dict[Any, Any]", value)
            return {
                str(key): _value(item, "number", f"{where}.{key}", path)
                for key, item in mapping.items()
            }
        case _:
            wanted = {
                "flag": "true or false",
                "rank": "a whole number or auto",
                "numbers": "a mapping of names to numbers",
            }.get(kind, f"a {kind}")
            raise FormatError(f"is {value!r}, not {wanted}", path=path, where=where)


def _number(value: Any) -> float | None:
    # YAML 1.1 reads 1e-3 as text, because it has no dot.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _beside(path: Path, name: str) -> str:
    """Return a path as seen from the recipe's folder, or the name itself: it may be a hub id."""
    near = path.parent / name
    return str(near) if near.exists() else name
