"""Read, check, convert, merge and audit LoRA adapters in every format.

The public names are imported when they are first used, so that `import adapterkit` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.base import BaseModel, open_base
    from adapterkit.convert import ConversionReport, convert
    from adapterkit.diff import DiffReport, ModuleDifference, diff
    from adapterkit.dtype import DType
    from adapterkit.errors import (
        AdapterKitError,
        BaseRequiredError,
        DestinationExistsError,
        FormatError,
        IncompatibleBaseError,
        LossyConversionError,
        NotFoundError,
        ProofError,
        TruncatedFileError,
        UncheckableError,
        UnknownArchitectureError,
        UnknownFormatError,
        UnsafePickleError,
        UnsupportedError,
        UsageError,
        WriteError,
    )
    from adapterkit.model import (
        AdapterTensorSet,
        BaseReference,
        LoraPair,
        Loss,
        Provenance,
        Role,
        TensorKey,
    )
    from adapterkit.summary import Summary, inspect, summarize
    from adapterkit.tensor import LazyTensor

__version__ = "0.1.0"

__all__ = [
    "AdapterKitError",
    "AdapterTensorSet",
    "BaseModel",
    "BaseReference",
    "BaseRequiredError",
    "ConversionReport",
    "DType",
    "DestinationExistsError",
    "DiffReport",
    "FormatError",
    "IncompatibleBaseError",
    "LazyTensor",
    "LoraPair",
    "Loss",
    "LossyConversionError",
    "ModuleDifference",
    "NotFoundError",
    "ProofError",
    "Provenance",
    "Role",
    "Summary",
    "TensorKey",
    "TruncatedFileError",
    "UncheckableError",
    "UnknownArchitectureError",
    "UnknownFormatError",
    "UnsafePickleError",
    "UnsupportedError",
    "UsageError",
    "WriteError",
    "__version__",
    "convert",
    "diff",
    "inspect",
    "open_base",
    "summarize",
]

# module -> public names that live in it
_HOMES = {
    "base": ("BaseModel", "open_base"),
    "convert": ("ConversionReport", "convert"),
    "diff": ("DiffReport", "ModuleDifference", "diff"),
    "dtype": ("DType",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "model": (
        "AdapterTensorSet",
        "BaseReference",
        "LoraPair",
        "Loss",
        "Provenance",
        "Role",
        "TensorKey",
    ),
    "summary": ("Summary", "inspect", "summarize"),
    "tensor": ("LazyTensor",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """The package: `adapterkit.convert` is the function, not the module that it lives in.

    Importing a submodule sets it as an attribute of its package; for names that are public
    something else, that is left out. `from adapterkit.convert import ...` works all the same.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in _HOME):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
