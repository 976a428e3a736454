"""Tables of a TOML file from a user's hand, read field by field."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar, cast

from adapterkit.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_Rule = TypeVar("_Rule")
_SOURCE = re.compile(r"file:.+|metadata:.+|beside:[^:/\\]+\.(json|ya?ml):.+")


class Table:
    """A TOML table that names itself in errors."""

    __slots__ = ("_path", "_raw", "_where")

    def __init__(self, raw: Mapping[str, Any], path: Path, where: str) -> None:
        self._raw = raw
        self._path = path
        self._where = where

    def error(self, key: str, message: str) -> FormatError:
        """Return an error that names the file and the field."""
        where = f"{self._where}.{key}" if self._where else key
        return FormatError(message, path=self._path, where=where)

    def only(self, *known: str) -> None:
        """Refuse fields that the grammar does not have."""
        for key in self._raw:
            if key not in known:
                raise self.error(key, f"is no field here; known: {', '.join(known)}")

    def text(self, key: str, usual: str | None = None) -> str:
        """Return a text; without a usual value the field must be there."""
        value = self._raw.get(key, usual)
        if not isinstance(value, str):
            raise self.error(key, "is missing" if value is None else "is not text")
        return value

    def optional(self, key: str) -> str | None:
        """Return a text, or None."""
        return self.text(key) if key in self._raw else None

    def flag(self, key: str, *, usual: bool) -> bool:
        """Return true or false."""
        value = self._raw.get(key, usual)
        if not isinstance(value, bool):
            raise self.error(key, "is not true or false")
        return value

    def number(self, key: str, usual: int | None, lowest: int) -> int:
        """Return a whole number."""
        value = self._raw.get(key, usual)
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise self.error(key, f"is not a whole number from {lowest}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, empty if absent."""
        value = self._raw.get(key, [])
        if not isinstance(value, list) or any(
            not isinstance(item, str) for item in cast("list[Any]", value)
        ):
            raise self.error(key, "is not a list of texts")
        return tuple(cast("list[str]", value))

    def mapping(self, key: str) -> dict[str, str] | None:
        """Return a table of texts, or None."""
        value = self._raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict) or any(
            not isinstance(item, str) for item in cast("dict[str, Any]", value).values()
        ):
            raise self.error(key, "is not a table of texts")
        return cast("dict[str, str]", value)

    def pattern(self, key: str, groups: tuple[str, ...] = ()) -> re.Pattern[str]:
        """Return a regular expression that has one of the groups."""
        return self._compiled(key, self.text(key), groups)

    def patterns(self, key: str) -> tuple[re.Pattern[str], ...]:
        """Return a list of regular expressions."""
        return tuple(self._compiled(key, text, ()) for text in self.texts(key))

    def _compiled(self, key: str, text: str, groups: tuple[str, ...]) -> re.Pattern[str]:
        try:
            pattern = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise self.error(key, f"{text!r} is no regular expression ({error})") from None
        if groups and not set(groups) & set(pattern.groupindex):
            named = " or ".join(f"(?P<{group}>...)" for group in groups)
            raise self.error(key, f"{text!r} has no group {named}")
        return pattern

    def sources(self, key: str) -> tuple[str, ...]:
        """Return a list of sources."""
        for source in (found := self.texts(key)):
            self.check_source(key, source)
        return found

    def check_source(self, key: str, source: str) -> str:
        """Return a source that is spelled right."""
        if not _SOURCE.fullmatch(source):
            raise self.error(
                key, f"{source!r} is no source; write file:a.b, metadata:key or beside:f.yaml:a.b"
            )
        return source

    def rows(self, key: str, build: Callable[[Table], _Rule]) -> tuple[_Rule, ...]:
        """Return an array of tables, each made into a rule."""
        value = self._raw.get(key, [])
        if not isinstance(value, list) or any(
            not isinstance(item, dict) for item in cast("list[Any]", value)
        ):
            raise self.error(key, f"is not an array of tables [[{key}]]")
        items = cast("list[dict[str, Any]]", value)
        return tuple(
            build(Table(item, self._path, f"{key}[{place}]")) for place, item in enumerate(items)
        )

    def table(self, key: str) -> Table | None:
        """Return a table, or None."""
        value = self._raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "is not a table")
        return Table(cast("dict[str, Any]", value), self._path, key)

    def raw(self, key: str) -> Any:
        """Return a field as it is."""
        return self._raw.get(key)
