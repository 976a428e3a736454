"""Dialect files: found by name or path, checked field by field, each error with its place."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.architectures.expressions import evaluate, parse_call
from adapterkit.architectures.transforms import TRANSFORMS
from adapterkit.errors import FormatError, UsageError
from adapterkit.formats.handwritten.dialects.grammar import (
    SCALES,
    BlockRule,
    ConvolutionRule,
    Dialect,
    Expectation,
    IgnoreRule,
    PartRule,
    RenameRule,
    StackRule,
    TensorRule,
    WeightRule,
)
from adapterkit.formats.handwritten.dialects.table import RuleTable
from adapterkit.patterns import Allowance
from adapterkit.storage import read_document
from adapterkit.tables import FLAG, TEXT, either, listed, mapped, number, one_of, shown, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_Parsed = TypeVar("_Parsed")
_HERE = Path(__file__).parent
_LARGEST = 1 << 20
_PARTS = 64
_MOST = 1 << 20
_VALUE = either(FLAG, number(), TEXT)
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
    allowance = None if path.parent == _HERE else Allowance()
    return _dialect(RuleTable(raw, path, "", allowance), name, path)


def _document(path: Path, trail: tuple[Path, ...]) -> dict[str, Any]:
    """Return the fields of a file over those of what it extends."""
    data = read_document(path, _LARGEST)
    # The time to read a key grows with the square of its parts.
    if any(line.partition(b"=")[0].count(b".") > _PARTS for line in data.splitlines()):
        raise FormatError(f"a key has more than {_PARTS} parts", path=path)
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


def _dialect(table: RuleTable, name: str, path: Path) -> Dialect:
    """Return the dialect that this, the whole document, describes."""
    table.only(_FIELDS)
    scale = table.get("scale", one_of(*SCALES))
    tensors = table.rows("tensor", _tensor)
    if not any(rule.axes for rule in tensors):
        raise table.error("tensor", "no rule has axes: nothing would be a factor")
    containers = table.get("containers", listed(one_of(*_CONTAINERS), len(_CONTAINERS), 1))
    weight = table.table("weight")
    return Dialect(
        name=name,
        path=path,
        title=table.get("title", TEXT),
        containers=containers,
        tensors=tensors,
        scale=scale,
        extends=table.optional("extends", TEXT),
        detect=table.get("detect", FLAG, usual=True),
        rivals=table.get("rivals", FLAG, usual=False),
        file=table.get("file", TEXT, ""),
        select=table.get("select", listed(TEXT), ()) or ("",),
        outside=table.patterns("outside"),
        requires=table.sources("requires"),
        expect=table.rows("expect", _expectation),
        strip=table.get("strip", listed(TEXT), ()),
        alpha=_alpha(table),
        base_name=table.sources("base_name"),
        weight=_weight(weight) if weight else None,
        modules=_modules(table),
        stride=table.get("stride", whole(1, _MOST), 1),
        ignore=table.rows("ignore", _ignore),
        stacks=table.rows("stack", _stack),
        blocks=table.rows("blocks", _blocks),
        parts=table.rows("parts", _parts),
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
    "stack",
    "blocks",
    "parts",
    "convolution",
    "rename",
)


def _tensor(table: RuleTable) -> TensorRule:
    table.only(("match", "axes", "embedding", "role", "unless"))
    axes, role = table.optional("axes", TEXT), table.optional("role", TEXT)
    if (axes is None) == (role is None):
        raise table.error("axes", "a rule has either axes or a role")
    if role is not None and role not in _ROLES:
        raise table.error("role", f"{role!r} is none of {', '.join(_ROLES)}")
    pattern, unless = table.pattern("match", ("module", "position")), table.optional("unless", TEXT)
    if unless is not None:
        _checked(table, "unless", _filled, unless, pattern.groupindex)
    return TensorRule(
        match=pattern,
        axes=_axes(table, "axes", axes, ("r", "in", "out")),
        embedding=_axes(
            table, "embedding", table.optional("embedding", TEXT), ("r", "vocab", "width")
        ),
        role=role,
        unless=unless,
    )


def _axes(
    table: RuleTable, key: str, text: str | None, allowed: tuple[str, ...]
) -> tuple[str, ...]:
    if text is None:
        return ()
    axes = tuple(text.split())
    plain = len(axes) == 2 and frozenset(axes) in _AXES and set(axes) <= set(allowed)  # noqa: PLR2004  (each once)
    if not plain and (axes not in _CONVOLUTION_AXES or "in" not in allowed):
        raise table.error(key, f"{text!r} are no axes of a factor, such as 'r in' or 'out r'")
    return axes


def _ignore(table: RuleTable) -> IgnoreRule:
    table.only(("match", "what", "whole"))
    return IgnoreRule(
        table.pattern("match"), table.get("what", TEXT), table.get("whole", FLAG, usual=False)
    )


def _expectation(table: RuleTable) -> Expectation:
    table.only(("source", "values", "message"))
    values = table.get("values", listed(_VALUE, least=1))
    source = table.check_source("source", table.get("source", TEXT))
    return Expectation(source, values, table.get("message", TEXT))


def _weight(table: RuleTable) -> WeightRule:
    table.only(("name", "axes"))
    several = isinstance(table.fields.get("name"), list)
    names = table.get("name", listed(TEXT)) if several else (table.get("name", TEXT),)
    axes = table.get("axes", TEXT, "out in")
    for name in names:
        _checked(table, "name", _filled, name, ("module",))
        if "{module}" not in name:
            raise table.error("name", f"{shown(name)} does not hold {{module}}")
    if axes not in {"out in", "either"}:
        raise table.error("axes", "is neither 'out in' nor 'either'")
    return WeightRule(names, axes)


def _blocks(table: RuleTable) -> BlockRule:
    table.only(("match", "slots", "enabled", "sizes", "numbers"))
    slots = table.get("slots", listed(TEXT), ())
    if not slots:
        raise table.error("slots", "is empty")
    enabled: Mapping[str, str] | tuple[str, ...]
    if isinstance(table.fields.get("enabled"), dict):
        enabled = table.get("enabled", mapped(TEXT))
        for source in enabled.values():
            table.check_source("enabled", source)
    else:
        enabled = table.get("enabled", listed(TEXT), ())
    sizes = table.optional("sizes", mapped(TEXT))
    for key, given in (("enabled", enabled), ("sizes", sizes or {})):
        if unknown := [slot for slot in given if slot not in slots]:
            raise table.error(key, f"{unknown[0]!r} is none of the slots")
    numbers = table.get("numbers", TEXT, "")
    if sizes is not None:
        if missing := [slot for slot in slots if slot not in sizes]:
            raise table.error("sizes", f"has no {missing[0]!r}")
        table.check_source("numbers", numbers + ":*")
        for slot, expression in sizes.items():
            _checked(table, f"sizes.{slot}", evaluate, expression, _any_size)
    return BlockRule(table.pattern("match"), slots, enabled, sizes, numbers)


def _stack(table: RuleTable) -> StackRule:
    table.only(("match", "to"))
    pattern, to = table.pattern("match"), table.get("to", TEXT)
    _checked(table, "to", _filled, to, (*pattern.groupindex, "n"))
    return StackRule(pattern, to)


def _parts(table: RuleTable) -> PartRule:
    table.only(("match", "rows", "repeats"))
    rows, repeats = table.get("rows", mapped(TEXT)), table.get("repeats", TEXT, "1")
    if not rows:
        raise table.error("rows", "is empty")
    for key, expression in (("repeats", repeats), *((f"rows.{n}", x) for n, x in rows.items())):
        _checked(table, key, evaluate, expression, _any_size)
    return PartRule(table.pattern("match"), rows, repeats)


def _convolution(table: RuleTable) -> ConvolutionRule:
    table.only(("match", "kernel"))
    return ConvolutionRule(table.pattern("match"), table.optional("kernel", whole(1, _MOST)))


def _rename(table: RuleTable) -> RenameRule:
    table.only(("match", "to", "slot", "slots", "rows"))
    pattern, to = table.pattern("match"), table.get("to", TEXT)
    _checked(table, "to", _filled, to, pattern.groupindex)
    slots = table.get("slots", whole(1, _MOST), 1)
    slot = table.get("slot", whole(0, _MOST), 0)
    if slot >= slots:
        raise table.error("slot", f"{slot} is not below slots = {slots}")
    rows = table.optional("rows", mapped(TEXT))
    for family, call in (rows or {}).items():
        if call and _checked(table, f"rows.{family}", parse_call, call).name not in TRANSFORMS:
            raise table.error("rows", f"{call!r} is no row order; known: {', '.join(TRANSFORMS)}")
    return RenameRule(pattern, to, slot, slots, rows)


def _checked(table: RuleTable, key: str, parse: Callable[..., _Parsed], *arguments: Any) -> _Parsed:
    try:
        return parse(*arguments)
    except _SENSELESS as error:
        raise table.error(key, f"{shown(arguments[0])} makes no sense here ({error})") from None


def _filled(template: str, groups: Iterable[str]) -> str:
    """Return a text whose holes `{name}` are filled; a width would let a line fill any memory."""
    holes = [hole for hole in Formatter().parse(template) if hole[1] is not None]
    if len(holes) > _MOST_HOLES:
        raise ValueError(f"{len(holes)} holes, the most is {_MOST_HOLES}")
    filling = dict.fromkeys(groups, "0")
    if odd := next((hole for hole in holes if hole[2] or hole[3] or hole[1] not in filling), None):
        raise ValueError(f"the hole {odd[1]} is no group, or has a width or conversion")
    return template.format_map(filling)


_MOST_HOLES = 16


def _any_size(name: str) -> int:
    del name
    return 1


def _alpha(table: RuleTable) -> float | tuple[str, ...]:
    value = table.fields.get("alpha")
    if isinstance(value, (int, float)):
        return table.get("alpha", number())
    return table.sources("alpha")


def _modules(table: RuleTable) -> Mapping[str, tuple[str, ...]] | None:
    value = table.fields.get("modules")
    if value is None:
        return None
    if isinstance(value, list):
        return {"": table.get("modules", listed(TEXT))}
    return table.get("modules", mapped(listed(TEXT)))
