"""Spectral audit: what is in an adapter, which ranks it needs, and what clashes when merged.

The public names are imported when they are first used: an audit needs no charts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.audit.base_report import BaseAudit, BaseSummary, NotCompared, WeightAudit
    from adapterkit.audit.compression import (
        CompressedFile,
        CompressReport,
        CompressResult,
        compress,
        compress_file,
    )
    from adapterkit.audit.html import html_page, write_html
    from adapterkit.audit.interference import (
        Interference,
        JointInterference,
        ModuleInterference,
        PairInterference,
    )
    from adapterkit.audit.json_document import document
    from adapterkit.audit.measure import audit, bank
    from adapterkit.audit.outliers import notable
    from adapterkit.audit.places import short_names
    from adapterkit.audit.plan import suggest
    from adapterkit.audit.rank_plan import Alternative, ModuleRank, RankPlan, Suggestion
    from adapterkit.audit.reference_bank import Bank, Member
    from adapterkit.audit.reference_report import ReferenceAudit, Standing
    from adapterkit.audit.report import (
        AdapterAudit,
        AuditReport,
        AuditSummary,
        FamilyAudit,
        LayerShare,
        ModuleAudit,
        Unaudited,
    )
    from adapterkit.audit.tables import csv_table, markdown, number, span

__all__ = [
    "AdapterAudit",
    "Alternative",
    "AuditReport",
    "AuditSummary",
    "Bank",
    "BaseAudit",
    "BaseSummary",
    "CompressReport",
    "CompressResult",
    "CompressedFile",
    "FamilyAudit",
    "Interference",
    "JointInterference",
    "LayerShare",
    "Member",
    "ModuleAudit",
    "ModuleInterference",
    "ModuleRank",
    "NotCompared",
    "PairInterference",
    "RankPlan",
    "ReferenceAudit",
    "Standing",
    "Suggestion",
    "Unaudited",
    "WeightAudit",
    "audit",
    "bank",
    "compress",
    "compress_file",
    "csv_table",
    "document",
    "html_page",
    "markdown",
    "notable",
    "number",
    "short_names",
    "span",
    "suggest",
    "write_html",
]

# module -> public names that live in it
_HOMES = {
    "base_report": (
        "BaseAudit",
        "BaseSummary",
        "NotCompared",
        "WeightAudit",
    ),
    "compression": (
        "CompressReport",
        "CompressResult",
        "CompressedFile",
        "compress",
        "compress_file",
    ),
    "html": (
        "html_page",
        "write_html",
    ),
    "interference": (
        "Interference",
        "JointInterference",
        "ModuleInterference",
        "PairInterference",
    ),
    "json_document": ("document",),
    "measure": (
        "audit",
        "bank",
    ),
    "outliers": ("notable",),
    "places": ("short_names",),
    "plan": ("suggest",),
    "rank_plan": (
        "Alternative",
        "ModuleRank",
        "RankPlan",
        "Suggestion",
    ),
    "reference_bank": (
        "Bank",
        "Member",
    ),
    "reference_report": (
        "ReferenceAudit",
        "Standing",
    ),
    "report": (
        "AdapterAudit",
        "AuditReport",
        "AuditSummary",
        "FamilyAudit",
        "LayerShare",
        "ModuleAudit",
        "Unaudited",
    ),
    "tables": (
        "csv_table",
        "markdown",
        "number",
        "span",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
