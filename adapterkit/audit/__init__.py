"""Spectral audit: what is in an adapter, which ranks it needs, and what clashes when merged."""

from adapterkit.audit.base_report import BaseAudit, BaseSummary, WeightAudit
from adapterkit.audit.base_sites import NotCompared
from adapterkit.audit.compress import (
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
from adapterkit.audit.plan import Alternative, ModuleRank, RankPlan, Suggestion, suggest
from adapterkit.audit.reference_bank import Bank, Member, ReferenceAudit, Standing
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
