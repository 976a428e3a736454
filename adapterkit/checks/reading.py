"""Read an adapter as far as it can be read: what stops a reader is a finding where one says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.checks.findings import Finding, Severity, named
from adapterkit.checks.gguf_file import check_gguf_file
from adapterkit.errors import FormatError, UnsafePickleError
from adapterkit.loading import Need, Source, load
from adapterkit.notes import NoteKind

if TYPE_CHECKING:
    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet

# Notes of reading that are findings about the base: code, severity, hint.
_SAID = {
    NoteKind.ORIGINAL: ("AK311", Severity.NOTE, ""),
    NoteKind.OTHER_BASE: ("AK307", Severity.WARNING, "is it the right base?"),
}


def read_for_validation(
    source: Source | AdapterTensorSet,
    *,
    base: BaseModel | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
) -> tuple[AdapterTensorSet | None, BaseModel | None, list[Finding]]:
    """Return the adapter, its base, given or found, and what stood in the way.

    The adapter is None if the findings say why its file cannot be read.

    Raises:
        FormatError: if the file is malformed in a way that no finding describes.
    """
    found: list[Finding] = []
    if isinstance(source, Source) and source.format.name == "gguf":
        found += check_gguf_file(source.path)
    try:
        loaded = load(source, base=base, dialect=dialect, alpha=alpha, need=Need.STORED)
    except UnsafePickleError as error:
        hint = "do not load it with any other program; ask for safetensors"
        found.append(Finding("AK404", Severity.ERROR, named(error.where), error.message, hint))
        return None, base, found
    except FormatError:
        if any(finding.severity is Severity.ERROR for finding in found):
            return None, base, found
        raise
    adapter, known, misfit = loaded.adapter, loaded.base, loaded.misfit
    for note in loaded.notes:
        if note.kind in _SAID:
            code, severity, hint = _SAID[note.kind]
            found.append(Finding(code, severity, (), note.text, hint))
    # Another architecture is found again, and said, by the comparison with the base.
    if misfit and known and adapter.base.architecture == known.architecture.gguf:
        hint = "is it the right base?"
        found.append(Finding("AK304", Severity.ERROR, named(misfit.where), misfit.message, hint))
    return adapter, known, found
