"""Dialect files: found by name or path, checked field by field, each error with its place."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from adapterkit.architectures.expressions import evaluate, parse_call
from adapterkit.architectures.transforms import TRANSFORMS
from adapterkit.dialects.grammar import (
    SCALES,
    BlockRule,
    ConvolutionRule,
    Dialect,
    Expectation,
    IgnoreRule,
    RenameRule,
    TensorRule,
    WeightRule,
)
from adapterkit.dialects.table import Table
from adapterkit.errors import FormatError, UsageError
from adapterkit.storage import read_document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_Parsed = TypeVar("_Parsed")
_HERE = Path(__file__).parent
_LARGEST = 1 << 20
_CONTAINERS = ("torch", "npz", "safetensors")
_AXES = {
    frozenset({"r", "in"}): ("r", "in"),
    frozenset({"out", "r"}): ("out", "r"),
    frozenset({"r", "vocab"}): ("r", "vocab"),
    frozenset({"width", "r"}): ("width", "r"),
}
_CONVOLUTION_AXES = (("r", "in", "*"), ("out", "r", "*"))
_SENSELESS = (
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
_ROLES = ("lora_bias", "down_bias", "magnitude", "full")


def names() -> tuple[str, ...]:
    """Return the names of the built-in dialects, sorted."""
    return tuple(sorted(path.stem for path in _HERE.glob("*.toml")))


@cache
def builtin() -> tuple[Dialect, ...]:
    """Return every built-in dialect, by name."""
    return tuple(load(name) for name in names())


def load(reference: str) -> Dialect:
    """Read a dialect by its name, or from a user's own TOML file by its path.

    Raises:
        UsageError: if it is neither a known name nor an existing file.
        FormatError: if the file breaks the grammar; the message names the field.
    """
    if reference in names():
        return _read(_HERE / f"{reference}.toml", reference)
    path = Path(reference)
    if path.is_file():
        return _read(path, reference)
    raise UsageError(
        f"no dialect and no file is called {reference!r}; known dialects: {', '.join(names())}"
    )


def _read(path: Path, name: str) -> Dialect:
    raw = _document(path, ())
    return _dialect(Table(raw, path, ""), name, path)


def _document(path: Path, trail: tuple[Path, ...]) -> dict[str, Any]:
    """Return the fields of a file over those of what it extends."""
    data = read_document(path, _LARGEST)
    try:
        raw: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not readable TOML ({error})", path=path) from None
    parent = raw.get("extends")
    if parent is None:
        return raw
    if not isinstance(parent, str) or parent not in names():
        raise FormatError(
            f"{parent!r} is no built-in dialect; known: {', '.join(names())}",
            path=path,
            where="extends",
        )
    if (source := _HERE / f"{parent}.toml") in trail or source == path:
        raise FormatError("extends itself", path=path, where="extends")
    # Whether a dialect is ever tried unasked is its own business.
    return {**_document(source, (*trail, path)), "detect": True, **raw}


def _dialect(table: Table, name: str, path: Path) -> Dialect:
    """Return the dialect that this, the whole document, describes."""
    table.only(*_FIELDS)
    scale = table.text("scale")
    if scale not in SCALES:
        raise table.error("scale", f"{scale!r} is none of {', '.join(SCALES)}")
    tensors = table.rows("tensor", _tensor)
    if not any(rule.axes for rule in tensors):
        raise table.error("tensor", "no rule has axes: nothing would be a factor")
    containers = table.texts("containers")
    if not containers or not set(containers) <= set(_CONTAINERS):
        raise table.error("containers", f"must be some of {', '.join(_CONTAINERS)}")
    weight = table.table("weight")
    return Dialect(
        name=name,
        path=path,
        title=table.text("title"),
        containers=containers,
        tensors=tensors,
        scale=scale,
        extends=table.optional("extends"),
        detect=table.flag("detect", usual=True),
        rivals=table.flag("rivals", usual=False),
        file=table.text("file", ""),
        select=table.texts("select") or ("",),
        outside=table.patterns("outside"),
        requires=table.sources("requires"),
        expect=table.rows("expect", _expectation),
        strip=table.texts("strip"),
        alpha=_alpha(table),
        base_name=table.sources("base_name"),
        weight=_weight(weight) if weight else None,
        modules=_modules(table),
        stride=table.number("stride", 1, 1),
        ignore=table.rows("ignore", _ignore),
        blocks=table.rows("blocks", _blocks),
        convolutions=table.rows("convolution", _convolution),
        renames=table.rows("rename", _rename),
    )


_FIELDS = (
    "title",
    "extends",
    "detect",
    "rivals",
    "file",
    "containers",
    "select",
    "outside",
    "requires",
    "expect",
    "strip",
    "scale",
    "alpha",
    "base_name",
    "weight",
    "modules",
    "stride",
    "tensor",
    "ignore",
    "blocks",
    "convolution",
    "rename",
)


def _tensor(table: Table) -> TensorRule:
    table.only("match", "axes", "embedding", "role", "unless")
    axes, role = table.optional("axes"), table.optional("role")
    if (axes is None) == (role is None):
        raise table.error("axes", "a rule has either axes or a role")
    if role is not None and role not in _ROLES:
        raise table.error("role", f"{role!r} is none of {', '.join(_ROLES)}")
    pattern, unless = table.pattern("match", ("module", "position")), table.optional("unless")
    if unless is not None:
        _checked(table, "unless", _filled, unless, pattern.groupindex)
    return TensorRule(
        match=pattern,
        axes=_axes(table, "axes", axes, ("r", "in", "out")),
        embedding=_axes(table, "embedding", table.optional("embedding"), ("r", "vocab", "width")),
        role=role,
        unless=unless,
    )


def _axes(table: Table, key: str, text: str | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    if text is None:
        return ()
    axes = tuple(text.split())
    plain = len(axes) == 2 and frozenset(axes) in _AXES and set(axes) <= set(allowed)  # noqa: PLR2004
    if not plain and (axes not in _CONVOLUTION_AXES or "in" not in allowed):
        raise table.error(key, f"{text!r} are no axes of a factor, such as 'r in' or 'out r'")
    return axes


def _ignore(table: Table) -> IgnoreRule:
    table.only("match", "what", "whole")
    return IgnoreRule(table.pattern("match"), table.text("what"), table.flag("whole", usual=False))


def _expectation(table: Table) -> Expectation:
    table.only("source", "values", "message")
    values = table.raw("values")
    if not isinstance(values, list) or not values:
        raise table.error("values", "is not a list of values")
    source = table.check_source("source", table.text("source"))
    return Expectation(source, tuple(cast("list[Any]", values)), table.text("message"))


def _weight(table: Table) -> WeightRule:
    table.only("name", "axes")
    listed = isinstance(table.raw("name"), list)
    names = table.texts("name") if listed else (table.text("name"),)
    axes = table.text("axes", "out in")
    for name in names:
        _checked(table, "name", _filled, name, ("module",))
        if "{module}" not in name:
            raise table.error("name", f"{name!r} does not hold {{module}}")
    if axes not in {"out in", "either"}:
        raise table.error("axes", "is neither 'out in' nor 'either'")
    return WeightRule(names, axes)


def _blocks(table: Table) -> BlockRule:
    table.only("match", "slots", "enabled", "sizes", "numbers")
    slots = table.texts("slots")
    if not slots:
        raise table.error("slots", "is empty")
    enabled: Mapping[str, str] | tuple[str, ...]
    if isinstance(table.raw("enabled"), dict):
        enabled = table.mapping("enabled") or {}
        for source in enabled.values():
            table.check_source("enabled", source)
    else:
        enabled = table.texts("enabled")
    sizes = table.mapping("sizes")
    for key, given in (("enabled", enabled), ("sizes", sizes or {})):
        if unknown := [slot for slot in given if slot not in slots]:
            raise table.error(key, f"{unknown[0]!r} is none of the slots")
    numbers = table.text("numbers", "")
    if sizes is not None:
        if missing := [slot for slot in slots if slot not in sizes]:
            raise table.error("sizes", f"has no {missing[0]!r}")
        table.check_source("numbers", numbers + ":*")
        for slot, expression in sizes.items():
            _checked(table, f"sizes.{slot}", evaluate, expression, _any_size)
    return BlockRule(table.pattern("match"), slots, enabled, sizes, numbers)


def _convolution(table: Table) -> ConvolutionRule:
    table.only("match", "kernel")
    kernel = table.number("kernel", None, 1) if table.raw("kernel") is not None else None
    return ConvolutionRule(table.pattern("match"), kernel)


def _rename(table: Table) -> RenameRule:
    table.only("match", "to", "slot", "slots", "rows")
    pattern, to = table.pattern("match"), table.text("to")
    _checked(table, "to", _filled, to, pattern.groupindex)
    slots = table.number("slots", 1, 1)
    slot = table.number("slot", 0, 0)
    if slot >= slots:
        raise table.error("slot", f"{slot} is not below slots = {slots}")
    rows = table.mapping("rows")
    for family, call in (rows or {}).items():
        if call and _checked(table, f"rows.{family}", parse_call, call).name not in TRANSFORMS:
            raise table.error("rows", f"{call!r} is no row order; known: {', '.join(TRANSFORMS)}")
    return RenameRule(pattern, to, slot, slots, rows)


def _checked(table: Table, key: str, parse: Callable[..., _Parsed], *arguments: Any) -> _Parsed:
    try:
        return parse(*arguments)
    except _SENSELESS as error:
        raise table.error(key, f"{arguments[0]!r} makes no sense here ({error})") from None


def _filled(template: str, groups: Iterable[str]) -> str:
    return template.format_map(dict.fromkeys(groups, "0"))


def _any_size(name: str) -> int:
    del name
    return 1


def _alpha(table: Table) -> float | tuple[str, ...]:
    value = table.raw("alpha")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return table.sources("alpha")


def _modules(table: Table) -> Mapping[str, tuple[str, ...]] | None:
    value = table.raw("modules")
    if value is None:
        return None
    if isinstance(value, list):
        return {"": table.texts("modules")}
    inner = table.table("modules")
    if inner is None:
        return None
    return {name: inner.texts(name) for name in cast("dict[str, Any]", value)}
