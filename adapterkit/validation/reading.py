"""Read an adapter as far as it can be read: what stops a reader is a finding where one says it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.base import find_base
from adapterkit.errors import FormatError, IncompatibleBaseError, UnsafePickleError
from adapterkit.reading import load
from adapterkit.registry import detect
from adapterkit.validation.findings import Finding, Severity
from adapterkit.validation.gguf_file import check_gguf_file

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.formats.protocol import Options
    from adapterkit.model import AdapterTensorSet


def read_for_validation(
    path: Path, options: Options
) -> tuple[AdapterTensorSet | None, Options, str, list[Finding]]:
    """Return the adapter, what it was read with, its format, and what stood in the way.

    The adapter is None if the findings say why its file cannot be read.

    Raises:
        FormatError: if the file is malformed in a way that no finding describes.
    """
    spec = detect(path)
    found = list(check_gguf_file(path)) if spec.name == "gguf" else []
    try:
        adapter, options = load(path, spec, options)
    except UnsafePickleError as error:
        hint = "do not load it with any other program; ask for safetensors"
        found.append(Finding("AK404", Severity.ERROR, error.where, error.message, hint))
        return None, options, spec.name, found
    except FormatError:
        if any(finding.severity is Severity.ERROR for finding in found):
            return None, options, spec.name, found
        raise
    except IncompatibleBaseError as error:
        adapter = spec.format.read(path, replace(options, base=None))
        base = options.base or find_base(adapter.base.name)
        if base is None or adapter.base.architecture == base.architecture.gguf:
            # Another architecture is found again, and said, by the comparison with the base.
            hint = "is it the right base?"
            found.append(Finding("AK304", Severity.ERROR, error.where, error.message, hint))
        return adapter, replace(options, base=base), spec.name, found
    return adapter, options, spec.name, found
