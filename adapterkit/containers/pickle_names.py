"""What a pickle may name that needs no library, and the keys that are quick to hash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_KEY_BITS = 60
_SCALARS = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, slots=True)
class Constructor:
    """A name that a pickle may call; what it gets is data, and so is what it makes.

    Attributes:
        name: the dotted name.
        build: makes the result of the arguments; raises ValueError if they make no sense.
    """

    name: str
    build: Callable[[tuple[object, ...]], object]


@dataclass(frozen=True, slots=True)
class RecordClass:
    """A class whose objects a pickle may hold; none is made of it but a `Record`.

    Attributes:
        name: its last part.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A name that a pickle may not name, and what it says of the file that it does.

    Attributes:
        reason: what the file is, and what to do.
    """

    reason: str


@dataclass(slots=True, eq=False)
class Record:
    """What a pickle says of an object: inert, and equal to itself alone.

    Attributes:
        kind: name of its class.
        arguments: what it was made with.
        state: what was then set of it, most often its fields by name; None if nothing was.
    """

    kind: str
    arguments: tuple[object, ...]
    state: object = None

    @property
    def plain(self) -> object:
        """What is known of it: its state, or what it was made with where it has none."""
        return self.arguments if self.state is None else self.state


def checked_key(value: Any) -> object:
    """Return a value that is quick to hash, as a key of a dict or a member of a set.

    Nested tuples can take time exponential in the length of the pickle, and large integers can be
    chosen to collide.

    Raises:
        ValueError: for anything but a scalar, a record, or a tuple of scalars.
    """
    if type(value) is Record:
        return value
    items = cast("tuple[Any, ...]", value if type(value) is tuple else (value,))
    for item in items:
        if type(item) not in _SCALARS:
            raise ValueError(f"a key that holds a {type(item).__name__}")
        if isinstance(item, int) and item.bit_length() > _MAX_KEY_BITS:
            raise ValueError(f"a key of {item.bit_length()} bits")
    return cast("object", value)


def _empty_dict(arguments: tuple[object, ...]) -> dict[object, object]:
    if arguments:
        raise ValueError("OrderedDict with arguments")
    return {}


def _set(arguments: tuple[Any, ...]) -> set[object]:
    match arguments:
        case ([*items],):
            return set(map(checked_key, items))
        case ():
            return set()
        case _:
            raise ValueError("set of something that is no list")


def _bytes(arguments: tuple[object, ...]) -> bytes:
    # Never bytes(number), which allocates.
    match arguments:
        case (bytes(data),):
            return data
        case ():
            return b""
        case _:
            raise ValueError("bytes of something that is not bytes")


def _encode(arguments: tuple[object, ...]) -> bytes:
    # How protocols before 3 spell bytes.
    match arguments:
        case (str(text), "latin1"):
            return text.encode("latin1")
        case _:
            raise ValueError("_codecs.encode with another encoding than latin1")


def _plain_names() -> dict[tuple[str, str], object]:
    names: dict[tuple[str, str], object] = {
        ("collections", "OrderedDict"): Constructor("collections.OrderedDict", _empty_dict),
        ("_codecs", "encode"): Constructor("_codecs.encode", _encode),
    }
    builtins: dict[str, Callable[[tuple[object, ...]], object]] = {
        "set": _set,
        "frozenset": lambda arguments: frozenset(_set(arguments)),
        "bytes": _bytes,
        "bytearray": _bytes,
    }
    for module in ("builtins", "__builtin__"):
        for name, build in builtins.items():
            names[module, name] = Constructor(f"builtins.{name}", build)
    return names


PLAIN_NAMES: Mapping[tuple[str, str], object] = _plain_names()
