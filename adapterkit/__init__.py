"""Read, check, convert, merge and audit LoRA adapters in every format.

The public names are imported when they are first used, so that `import adapterkit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# Module -> the public names that live in it; `__init__.pyi` says the same to type checkers.
_NAMES = {
    "alterations": "Change",
    "architectures.sizes": "Sizes",
    "architectures.table": "Architecture",
    "attempts": "Attempt for_each",
    "auditing.base_report": "BaseAudit BaseSummary NotCompared WeightAudit",
    "auditing.html": "html_page write_html",
    "auditing.interference": "Interference JointInterference ModuleInterference PairInterference",
    "auditing.measure": "audit",
    "auditing.plan": "suggest",
    "auditing.reference_bank": "Bank Member bank",
    "auditing.reference_report": "ReferenceAudit Standing",
    "auditing.report": (
        "AdapterAudit AuditReport AuditSummary FamilyAudit LayerShare ModuleAudit Unaudited"
    ),
    "base.model": "BaseModel",
    "base.opening": "open_base",
    "checks.findings": "CoveredModule Explanation Finding Outcome Severity Verdict explanations",
    "comparison": "DiffReport ModuleDifference diff",
    "compressed": "CompressReport CompressResult CompressedFile",
    "compression": "compress compress_file",
    "conversion": "ConversionReport convert convert_all",
    "destination": "Directory",
    "doctor.examination": "Condition DoctorReport examine",
    "dtype": "DType",
    "engines.engine": "EngineRule NameRule Target load_target target_names",
    "engines.judgement": "EngineCoverage",
    "errors": (
        "AdapterKitError BaseRequiredError DestinationExistsError FormatError "
        "IncompatibleBaseError LossyConversionError NotFoundError ProofError TruncatedFileError "
        "UncheckableError UnknownArchitectureError UnknownFormatError UnsafePickleError "
        "UnsupportedError UsageError WriteError"
    ),
    "extraction.extraction": "extract",
    "extraction.report": "ExtractReport ExtractedModule LeftOver",
    "files": "read write",
    "fingerprints": "Fingerprint ModuleFingerprint",
    "fleets.ledger": "FleetRow",
    "fleets.pages": "write_fleet_tables",
    "fleets.running": "FleetReport run_fleet",
    "fleets.similarity": "Copy LikelyMerge SimilarityReport find_similar",
    "formats.protocol": "FormatOptions Lister Reader Writer",
    "formats.spec": "FormatSpec",
    "keys": "Role TensorKey",
    "lowrank.rank_plan": "Alternative ModuleRank RankPlan Suggestion",
    "merging.adapters": "MergeResult merge",
    "merging.aliases": "MethodAlias",
    "merging.files": "MergeFilesReport merge_files",
    "merging.into.entry": "merge_into",
    "merging.into.report": "MergeIntoReport NearestReport TensorReport",
    "merging.recipe": "Recipe read_recipe",
    "merging.registry": "MethodSpec merge_methods",
    "merging.report": "MergeReport ModuleReport",
    "model.adapter": "AdapterTensorSet",
    "model.beside": "BesideFile BesideKind",
    "model.losses": "lost_beyond_pairs",
    "model.sources": "DiffusionSource GgufSource MlxSource OnnxSource PeftSource Source Spelling",
    "model.update": "Kind Update",
    "notes": "BaseReference Loss Note NoteKind Provenance",
    "page": "write_page",
    "saving": "ProvenFile",
    "serving.launch": "ServingSettings serving_settings",
    "serving.members": (
        "AdapterIncompatibleError AdapterLoadFailedError AdapterNotFoundError StackError "
        "StackedAdapter"
    ),
    "serving.stack": "AdapterStack",
    "serving.sums": "Conflict",
    "state_dict": "from_state_dict to_state_dict",
    "summary": "BesideEntry Summary inspect summarize",
    "tensor": "LazyTensor",
    "text": "Pen",
    "validation": "ValidationReport validate validation_page",
    "verification": "VerifyReport verify",
    "work": "watched",
}
# Public modules beside the names: `adapterkit.torch.from_state_dict`.
_SUBMODULES = ("torch",)
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 (they are texts)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
