"""Read, check, convert, merge and audit LoRA adapters in every format.

The public names are imported when they are first used, so that `import adapterkit` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.audit import (
        AdapterAudit,
        AuditReport,
        CompressedFile,
        CompressReport,
        CompressResult,
        RankPlan,
        audit,
        compress,
        compress_file,
        suggest,
    )
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
    from adapterkit.extract import ExtractedModule, ExtractReport, LeftOver, extract
    from adapterkit.files import read, write
    from adapterkit.keys import Role, TensorKey
    from adapterkit.merge import (
        MergeFilesReport,
        MergeIntoReport,
        MergeReport,
        MergeResult,
        merge,
        merge_files,
        merge_into,
        merge_methods,
        read_recipe,
    )
    from adapterkit.model import AdapterTensorSet, BesideFile, BesideKind, Kind, Update
    from adapterkit.notes import BaseReference, Loss, Note, NoteKind, Provenance
    from adapterkit.stack import (
        AdapterIncompatibleError,
        AdapterLoadFailedError,
        AdapterNotFoundError,
        AdapterStack,
        StackError,
    )
    from adapterkit.state_dict import from_state_dict, to_state_dict
    from adapterkit.summary import BesideEntry, Summary, inspect, summarize
    from adapterkit.tensor import LazyTensor
    from adapterkit.validation import Finding, Severity, ValidationReport, validate

__version__ = "0.1.0"

__all__ = [
    "AdapterAudit",
    "AdapterIncompatibleError",
    "AdapterKitError",
    "AdapterLoadFailedError",
    "AdapterNotFoundError",
    "AdapterStack",
    "AdapterTensorSet",
    "AuditReport",
    "BaseModel",
    "BaseReference",
    "BaseRequiredError",
    "BesideEntry",
    "BesideFile",
    "BesideKind",
    "CompressReport",
    "CompressResult",
    "CompressedFile",
    "ConversionReport",
    "DType",
    "DestinationExistsError",
    "DiffReport",
    "ExtractReport",
    "ExtractedModule",
    "Finding",
    "FormatError",
    "IncompatibleBaseError",
    "Kind",
    "LazyTensor",
    "LeftOver",
    "Loss",
    "LossyConversionError",
    "MergeFilesReport",
    "MergeIntoReport",
    "MergeReport",
    "MergeResult",
    "ModuleDifference",
    "NotFoundError",
    "Note",
    "NoteKind",
    "ProofError",
    "Provenance",
    "RankPlan",
    "Role",
    "Severity",
    "StackError",
    "Summary",
    "TensorKey",
    "TruncatedFileError",
    "UncheckableError",
    "UnknownArchitectureError",
    "UnknownFormatError",
    "UnsafePickleError",
    "UnsupportedError",
    "Update",
    "UsageError",
    "ValidationReport",
    "WriteError",
    "__version__",
    "audit",
    "compress",
    "compress_file",
    "convert",
    "diff",
    "extract",
    "from_state_dict",
    "inspect",
    "merge",
    "merge_files",
    "merge_into",
    "merge_methods",
    "open_base",
    "read",
    "read_recipe",
    "suggest",
    "summarize",
    "to_state_dict",
    "validate",
    "write",
]

_STACK_ERRORS = (
    "AdapterIncompatibleError",
    "AdapterLoadFailedError",
    "AdapterNotFoundError",
    "StackError",
)
# module -> public names that live in it
_HOMES = {
    "audit": (
        "AdapterAudit",
        "AuditReport",
        "CompressReport",
        "CompressResult",
        "CompressedFile",
        "RankPlan",
        "audit",
        "compress",
        "compress_file",
        "suggest",
    ),
    "base": ("BaseModel", "open_base"),
    "convert": ("ConversionReport", "convert"),
    "diff": ("DiffReport", "ModuleDifference", "diff"),
    "dtype": ("DType",),
    "extract": ("ExtractReport", "ExtractedModule", "LeftOver", "extract"),
    "files": ("read", "write"),
    "stack": ("AdapterStack", *_STACK_ERRORS),
    "state_dict": ("from_state_dict", "to_state_dict"),
    "errors": tuple(
        name for name in __all__ if name.endswith("Error") and name not in _STACK_ERRORS
    ),
    "merge": (
        "MergeFilesReport",
        "MergeIntoReport",
        "MergeReport",
        "MergeResult",
        "merge",
        "merge_files",
        "merge_into",
        "merge_methods",
        "read_recipe",
    ),
    "keys": ("Role", "TensorKey"),
    "model": ("AdapterTensorSet", "BesideFile", "BesideKind", "Kind", "Update"),
    "notes": ("BaseReference", "Loss", "Note", "NoteKind", "Provenance"),
    "summary": ("BesideEntry", "Summary", "inspect", "summarize"),
    "tensor": ("LazyTensor",),
    "validation": ("Finding", "Severity", "ValidationReport", "validate"),
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
