"""Functions that rows of data name, imported when they are called."""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def called(reference: Callable[..., Any] | str) -> Callable[..., Any]:
    """Return the function itself, importing what is named as `module:name`."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return attrgetter(name)(import_module(module))
