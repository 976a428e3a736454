"""A mapping that was read from a file, whose fields are asked for by what they must be.

    fields = Table(read_json_object(path), path)
    rank = fields.get("r", whole(1, 1 << 20), 8)
    patterns = fields.get("alpha_pattern", mapped(number()), {})

A value that is something else ends in one kind of error, which names the file, the field, what is
expected and what is there: `lora_alpha: expects a finite number, has '16'`. Fields that nobody asks
for are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast, overload

from adapterkit.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)
_U = TypeVar("_U")

LONGEST_TEXT = 1 << 16
MOST_ITEMS = 1 << 20
# Wider whole numbers than this are no setting of anything, and take long to spell out.
_WIDEST_BITS = 64
_LONGEST_NUMBER = 64
_SHOWN = 40
_ABSENT = object()


class UnfitError(Exception):
    """A value is not of the kind that is expected; `Table` says where it stands.

    Attributes:
        expected: what would fit.
        value: what is there.
        within: the way to it inside the field, as `[2]` or `.name`.
    """

    def __init__(self, expected: str, value: object, within: str = "") -> None:
        super().__init__(expected)
        self.expected = expected
        self.value = value
        self.within = within


@dataclass(frozen=True, slots=True)
class Kind(Generic[_T_co]):
    """What a field must be.

    Attributes:
        expected: in words that follow "expects".
        read: returns the value as it is used; raises UnfitError.
    """

    expected: str
    read: Callable[[object], _T_co]

    def held_by(self, value: object) -> bool:
        """Tell whether a value is of this kind."""
        try:
            self.read(value)
        except UnfitError:
            return False
        return True


class Table:
    """The fields of one mapping, and where it stands.

    Attributes:
        fields: the mapping as it was read.
        path: the file, for messages.
        where: dotted path of the mapping in the file, empty for the whole of it.
    """

    __slots__ = ("fields", "path", "where")

    def __init__(self, fields: Mapping[Any, Any], path: Path | None, where: str = "") -> None:
        self.fields = fields
        self.path = path
        self.where = where

    def error(self, name: str, message: str) -> FormatError:
        """Return an error that names the file and a field."""
        where = f"{self.where}.{name}" if self.where and name else self.where or name
        return FormatError(message, path=self.path, where=where or None)

    @overload
    def get(self, name: str, kind: Kind[_T]) -> _T: ...
    @overload
    def get(self, name: str, kind: Kind[_T], usual: _U) -> _T | _U: ...
    def get(self, name: str, kind: Kind[Any], usual: Any = _ABSENT) -> Any:
        """Return a field; if it is absent `usual`, where that is given.

        Raises:
            FormatError: if it is of another kind, or missing.
        """
        if name not in self.fields:
            if usual is _ABSENT:
                raise self.error(name, f"is missing; expects {kind.expected}")
            return usual
        return self.checked(name, self.fields[name], kind)

    def optional(self, name: str, kind: Kind[_T]) -> _T | None:
        """Return a field, None if it is absent or null.

        Raises:
            FormatError: if it is of another kind.
        """
        value = self.fields.get(name)
        return None if value is None else self.checked(name, value, kind)

    def table(self, name: str) -> Self | None:
        """Return a mapping inside this one, None if it is absent or null.

        Raises:
            FormatError: if it is something else.
        """
        fields = self.optional(name, ANY_MAPPING)
        return None if fields is None else self.inner(name, fields)

    def inner(self, name: str, fields: Mapping[Any, Any]) -> Self:
        """Return a mapping that stands under `name` in this one."""
        return type(self)(fields, self.path, f"{self.where}.{name}" if self.where else name)

    def only(self, known: Collection[str], what: str = "field") -> None:
        """Refuse fields that are none of the known ones.

        Raises:
            FormatError: naming the first.
        """
        for name in self.fields:
            if name not in known:
                message = f"unknown {what}; known are {', '.join(known)}"
                raise self.error(printable(name), message)

    def checked(self, name: str, value: object, kind: Kind[_T]) -> _T:
        """Return a value that stands under `name`, as its kind has it.

        Raises:
            FormatError: if it is of another kind.
        """
        try:
            return kind.read(value)
        except UnfitError as odd:
            message = f"expects {odd.expected}, has {shown(odd.value)}"
            raise self.error(name + odd.within, message) from None


def whole(least: int, most: int, *, integral: bool = False) -> Kind[int]:
    """Return the kind of whole numbers in a range.

    Args:
        least: the smallest that fits.
        most: the largest that fits.
        integral: whether 8.0 is 8, as programs write it that know one kind of number.
    """
    expected = f"a whole number from {least} to {most}"

    def read(value: object) -> int:
        if integral and isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UnfitError(expected, value)
        return value

    return Kind(expected, read)


def number(
    least: float = -math.inf, most: float = math.inf, *, spelled: bool = False
) -> Kind[float]:
    """Return the kind of finite numbers in a range.

    Args:
        least: the smallest that fits.
        most: the largest that fits.
        spelled: whether text that spells a number is one: YAML 1.1 reads 1e-3 as text.
    """
    bounded = math.isfinite(least) or math.isfinite(most)
    expected = f"a number from {least:g} to {most:g}" if bounded else "a finite number"

    def read(value: object) -> float:
        found = _finite(value, spelled=spelled)
        if found is None or not least <= found <= most:
            raise UnfitError(expected, value)
        return found

    return Kind(expected, read)


def _finite(value: object, *, spelled: bool) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and (not spelled or len(value) > _LONGEST_NUMBER):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def text(longest: int = LONGEST_TEXT, *, empty: bool = True) -> Kind[str]:
    """Return the kind of texts of at most so many characters."""
    expected = "text" if empty else "text that is not empty"
    expected += "" if longest == LONGEST_TEXT else f" of at most {longest} characters"

    def read(value: object) -> str:
        if not isinstance(value, str) or len(value) > longest or not (value or empty):
            raise UnfitError(expected, value)
        return value

    return Kind(expected, read)


def one_of(*known: str) -> Kind[str]:
    """Return the kind of the texts `known`."""
    expected = f"one of {', '.join(known)}"

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in known:
            raise UnfitError(expected, value)
        return value

    return Kind(expected, read)


def either(*kinds: Kind[Any]) -> Kind[Any]:
    """Return the kind of what is of one of several kinds; the first that fits is taken."""
    expected = " or ".join(kind.expected for kind in kinds)

    def read(value: object) -> Any:
        for kind in kinds:
            try:
                return kind.read(value)
            except UnfitError:
                continue
        raise UnfitError(expected, value)

    return Kind(expected, read)


def listed(kind: Kind[_T], most: int = MOST_ITEMS, least: int = 0) -> Kind[tuple[_T, ...]]:
    """Return the kind of lists of at least and at most so many items of one kind."""
    count = f" of {least} to {most}" if least or most != MOST_ITEMS else ""
    expected = f"a list{count} ({kind.expected} each)"

    def read(value: object) -> tuple[_T, ...]:
        if not isinstance(value, (list, tuple)):
            raise UnfitError(expected, value)
        items = cast("list[object]", value)
        if not least <= len(items) <= most:
            raise UnfitError(expected, items)
        return tuple(_inside(kind, item, f"[{place}]") for place, item in enumerate(items))

    return Kind(expected, read)


_ANYTHING: Kind[Any] = Kind("anything", lambda value: value)


def mapped(kind: Kind[_T], most: int = MOST_ITEMS) -> Kind[dict[str, _T]]:
    """Return the kind of mappings from names to at most so many values of one kind."""
    expected = "a mapping" if kind is _ANYTHING else f"a mapping of names ({kind.expected} each)"

    def read(value: object) -> dict[str, _T]:
        if not isinstance(value, Mapping):
            raise UnfitError(expected, value)
        items = cast("Mapping[object, object]", value)
        if len(items) > most or not all(isinstance(name, str) for name in items):
            raise UnfitError(expected, items)
        return {
            str(name): _inside(kind, item, f".{printable(name)}") for name, item in items.items()
        }

    return Kind(expected, read)


def _inside(kind: Kind[_T], value: object, within: str) -> _T:
    try:
        return kind.read(value)
    except UnfitError as odd:
        raise UnfitError(odd.expected, odd.value, within + odd.within) from None


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise UnfitError(FLAG.expected, value)
    return value


FLAG = Kind("true or false", _flag)
TEXT = text()
# A mapping of names to anything, to be asked in its turn.
ANY_MAPPING: Kind[Mapping[str, Any]] = mapped(_ANYTHING)
NAME = text(empty=False)


def shown(value: object) -> str:
    """Return what a message says of a value: short and printable, whatever it is."""
    words: str
    match value:
        case None | bool():
            words = "null" if value is None else str(value).lower()
        case int() if value.bit_length() > _WIDEST_BITS:
            words = f"a whole number of {value.bit_length()} bits"
        case int() | float():
            words = repr(value)
        case str():
            words = repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")
        case list() | tuple():
            words = f"a list of {len(cast('list[object]', value))}"
        case Mapping():
            words = f"a mapping of {len(cast('Mapping[object, object]', value))}"
        case _:
            words = f"a {type(value).__name__}"
    return words


def printable(name: object) -> str:
    """Return a field's name as messages have it: in one line, and not longer than one."""
    if isinstance(name, str) and name.isprintable() and len(name) <= 2 * _SHOWN:
        return name
    return shown(name)
