"""What other packages add to a table of ours: rows that their entry points name."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from adapterkit.errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.metadata import EntryPoint


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_HasName)


@functools.cache
def plugged_in(group: str) -> tuple[Any, ...]:
    """Return what the entry points of a group name."""
    # Looked up only when nothing built in answers: the import alone is slow.
    from importlib.metadata import entry_points

    return tuple(_loaded(entry) for entry in entry_points(group=group))


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"the plug-in {entry.name!r} ({entry.value}) cannot be imported: {reason}; mend it, or "
            "uninstall the package that brings it"
        ) from error


def named(what: str, name: str, builtin: Sequence[_Named], group: str) -> _Named:
    """Return the row of a name, built in or from the entry points of a group.

    Raises:
        UsageError: if there is none; the message lists all.
    """
    if found := next((known for known in builtin if known.name == name), None):
        return found
    every: tuple[_Named, ...] = (*builtin, *plugged_in(group))
    if found := next((known for known in every if known.name == name), None):
        return found
    raise unknown(what, name, (known.name for known in every))
