"""Merge adapters into one adapter, without a base model, or into the weights of a base.

The public names are imported when they are first used: listing the methods needs no numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.merge.adapters import MergeResult, merge
    from adapterkit.merge.files import MergeFilesReport, merge_files
    from adapterkit.merge.into import MergeIntoReport, merge_into
    from adapterkit.merge.recipe import Recipe, read_recipe
    from adapterkit.merge.registry import MethodSpec
    from adapterkit.merge.registry import methods as merge_methods
    from adapterkit.merge.report import MergeReport, ModuleReport

__all__ = [
    "MergeFilesReport",
    "MergeIntoReport",
    "MergeReport",
    "MergeResult",
    "MethodSpec",
    "ModuleReport",
    "Recipe",
    "merge",
    "merge_files",
    "merge_into",
    "merge_methods",
    "read_recipe",
]

# public name -> module and its name there
_HOME = {
    "MergeFilesReport": "files:MergeFilesReport",
    "MergeIntoReport": "into:MergeIntoReport",
    "MergeReport": "report:MergeReport",
    "MergeResult": "adapters:MergeResult",
    "MethodSpec": "registry:MethodSpec",
    "ModuleReport": "report:ModuleReport",
    "Recipe": "recipe:Recipe",
    "merge": "adapters:merge",
    "merge_files": "files:merge_files",
    "merge_into": "into:merge_into",
    "merge_methods": "registry:methods",
    "read_recipe": "recipe:read_recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
