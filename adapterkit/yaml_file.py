"""Small YAML documents that come from strangers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import FormatError
from adapterkit.storage import read_document

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_DEEPEST = 64


def read_yaml_mapping(path: Path, *, largest: int) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; its tags build nothing but plain data.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        NotFoundError: if there is no such file.
        FormatError: if it is no regular file, larger or no YAML, holds aliases, has a key twice,
            or is no mapping.
    """
    import yaml

    data = read_document(path, largest)
    try:
        text = data.decode("utf-8")
        # A few aliases of aliases unfold to more than any memory holds, and no settings need any.
        depth = 0
        for event in _events(text):
            if isinstance(event, yaml.AliasEvent):
                raise FormatError("holds YAML aliases; write its values out", path=path)
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            # The parser takes time with the square of it.
            if depth > _DEEPEST:
                raise FormatError(f"is nested deeper than {_DEEPEST} levels", path=path)
        twice = _twice(cast("Any", yaml).compose(text, Loader=yaml.SafeLoader))
        value: object = yaml.safe_load(text)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"is not readable YAML ({reason})", path=path) from None
    if twice:
        raise FormatError("is there twice", path=path, where=twice)
    if not isinstance(value, dict):
        raise FormatError("is not a mapping of keys to values", path=path)
    return cast("dict[str, Any]", value)


def _events(text: str) -> Iterable[object]:
    import yaml

    # The function has no typed result.
    return cast("Any", yaml).parse(text, Loader=yaml.SafeLoader)


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
