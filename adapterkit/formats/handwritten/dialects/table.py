"""Tables of a TOML file from a user's hand, read field by field."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.errors import UncheckableError
from adapterkit.patterns import Allowance, Expression
from adapterkit.tables import ANY_MAPPING, TEXT, Table, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from adapterkit.formats.handwritten.dialects.grammar import Pattern

_Rule = TypeVar("_Rule")
_SOURCE = re.compile(r"file:.+|metadata:.+|beside:[^:/\\]+\.(json|ya?ml):.+")


class RuleTable(Table):
    """A table of a dialect file.

    Attributes:
        allowance: time that its expressions share; None for a file of ours, which needs no limit.
    """

    __slots__ = ("allowance",)

    def __init__(
        self,
        fields: Mapping[Any, Any],
        path: Path | None,
        where: str = "",
        allowance: Allowance | None = None,
    ) -> None:
        super().__init__(fields, path, where)
        self.allowance = allowance

    def inner(self, name: str, fields: Mapping[Any, Any]) -> RuleTable:
        """Return a table inside this one, which shares its allowance."""
        inner = super().inner(name, fields)
        inner.allowance = self.allowance
        return inner

    def pattern(self, key: str, groups: tuple[str, ...] = ()) -> Pattern:
        """Return a regular expression that has one of the groups."""
        return self._compiled(key, self.get(key, TEXT), groups)

    def patterns(self, key: str) -> tuple[Pattern, ...]:
        """Return a list of regular expressions."""
        return tuple(self._compiled(key, text, ()) for text in self.get(key, listed(TEXT), ()))

    def _compiled(self, key: str, text: str, groups: tuple[str, ...]) -> Pattern:
        pattern = re.compile(text) if self.allowance is None else Expression(text, self.allowance)
        try:
            known = pattern.groupindex
        except UncheckableError as error:
            raise self.error(key, error.message) from None
        if groups and not set(groups) & set(known):
            named = " or ".join(f"(?P<{group}>...)" for group in groups)
            raise self.error(key, f"{text!r} has no group {named}")
        return pattern

    def sources(self, key: str) -> tuple[str, ...]:
        """Return a list of sources."""
        for source in (found := self.get(key, listed(TEXT), ())):
            self.check_source(key, source)
        return found

    def check_source(self, key: str, source: str) -> str:
        """Return a source that is spelled right."""
        if not _SOURCE.fullmatch(source):
            raise self.error(
                key, f"{source!r} is no source; write file:a.b, metadata:key or beside:f.yaml:a.b"
            )
        return source

    def rows(self, key: str, build: Callable[[RuleTable], _Rule]) -> tuple[_Rule, ...]:
        """Return an array of tables, each made into a rule."""
        items = self.get(key, listed(ANY_MAPPING), ())
        return tuple(build(self.inner(f"{key}[{place}]", item)) for place, item in enumerate(items))
