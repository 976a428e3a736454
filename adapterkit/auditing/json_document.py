"""An audit as one JSON document."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from adapterkit.attempts import failure

if TYPE_CHECKING:
    from adapterkit.auditing.rank_plan import Suggestion
    from adapterkit.auditing.report import AdapterAudit, AuditReport


def document(report: AuditReport) -> dict[str, Any]:
    """Return what `--json` shows: `interference`, and as `results` every adapter's fields.

    Values are dataclasses, tuples and numbers; `suggestion` stands beside the `summary` that it is
    about. Those that could not be audited come last.
    """
    suggestions = report.suggestions or (None,) * len(report.adapters)
    listed = [
        _adapter(audited, suggestion)
        for audited, suggestion in zip(report.adapters, suggestions, strict=True)
    ]
    return {
        "results": [*listed, *map(failure, report.failed)],
        "interference": report.interference,
    }


def _adapter(audited: AdapterAudit, suggestion: Suggestion | None) -> dict[str, object]:
    content: dict[str, object] = {
        field.name: getattr(audited, field.name) for field in fields(audited)
    }
    if suggestion is not None:
        content["suggestion"] = suggestion
    return content
