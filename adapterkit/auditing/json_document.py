"""An audit as one JSON document: flat for a single adapter, a list for several."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterkit.auditing.rank_plan import Suggestion
    from adapterkit.auditing.report import AdapterAudit, AuditReport


def document(report: AuditReport) -> dict[str, object]:
    """Return what `--json` shows: the fields of the one adapter, or `adapters` and `interference`.

    Values are dataclasses, tuples and numbers; `suggestion` stands beside the `summary` that it is
    about.
    """
    suggestions = report.suggestions or (None,) * len(report.adapters)
    listed = [
        _adapter(audited, suggestion)
        for audited, suggestion in zip(report.adapters, suggestions, strict=True)
    ]
    if report.interference is None:
        return listed[0]
    return {"adapters": listed, "interference": report.interference}


def _adapter(audited: AdapterAudit, suggestion: Suggestion | None) -> dict[str, object]:
    content: dict[str, object] = {
        field.name: getattr(audited, field.name) for field in fields(audited)
    }
    if suggestion is not None:
        content["suggestion"] = suggestion
    return content
