"""The alpha that a user gives is for files that hold none, and overrules no file."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.errors import AdapterKitError, UsageError
from adapterkit.model.alpha import stated_alphas

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.formats.spec import FormatSpec
    from adapterkit.model import AdapterTensorSet

# An alpha that was rounded to float32, as GGUF holds it, is the same one.
_SAME_ALPHA = 1e-6


def check_number(alpha: float | None) -> None:
    """Refuse an alpha that is no scale's numerator.

    Raises:
        UsageError: if it is not a finite number above 0.
    """
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"--alpha is {alpha:g}; it must be a finite number above 0")


def filled(
    known: FormatSpec, path: Path, options: FormatOptions
) -> tuple[AdapterTensorSet, FormatOptions]:
    """Read a file; alpha is for one that leaves it open, and the options say whether it did."""
    without = replace(options, alpha=None)
    try:
        return known.read(path, without), without
    except AdapterKitError as error:
        if options.alpha is None or error.needs != "alpha":
            raise
    adapter = known.read(path, options)
    if adapter.provenance is None:
        return adapter, options
    told = [f"--alpha {repr(options.alpha).removesuffix('.0')}"]
    told += [f"--dialect {shlex.quote(options.dialect)}"] if options.dialect else []
    provenance = replace(adapter.provenance, options=tuple(told))
    return adapter.replace(provenance=provenance), options


def check_no_other(alpha: float | None, adapters: Iterable[tuple[str, AdapterTensorSet]]) -> None:
    """Refuse an alpha that adapters, each with its path, hold and that differs from theirs.

    Raises:
        UsageError: naming the file, and both.
    """
    if alpha is None:
        return
    for path, adapter in adapters:
        found = stated_alphas(adapter)
        if any(not math.isclose(alpha, one, rel_tol=_SAME_ALPHA) for one in found):
            low, high = min(found), max(found)
            shown = f"{low:g}" if math.isclose(low, high) else f"{low:g} to {high:g}"
            raise UsageError(
                f"alpha is {shown} in the file, --alpha is {alpha:g}; leave it out, it is for "
                "files that do not hold it",
                path=path,
            )
