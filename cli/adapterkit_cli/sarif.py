"""Validation reports as SARIF 2.1.0 (OASIS), the format of code scanners."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import adapterkit

if TYPE_CHECKING:
    from adapterkit import Finding, ValidationReport

_LEVELS = {"error": "error", "unchecked": "warning", "warning": "warning", "note": "note"}
_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def document(report: ValidationReport) -> str:
    """Return the report as one SARIF run."""
    from adapterkit import explanations

    known = explanations()
    codes = list(dict.fromkeys(finding.code for finding in report.findings))
    rules = [
        {
            "id": code,
            "shortDescription": {"text": known[code].title},
            "fullDescription": {"text": f"{known[code].meaning} {known[code].matters}"},
            "help": {"text": known[code].action},
        }
        for code in codes
    ]
    driver = {"name": "adapterkit", "version": adapterkit.__version__, "rules": rules}
    results = [_result(finding, report.path, codes) for finding in report.findings]
    run = {"tool": {"driver": driver}, "results": results}
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]})


def _result(finding: Finding, path: str, codes: list[str]) -> dict[str, object]:
    location: dict[str, object] = {"physicalLocation": {"artifactLocation": {"uri": path}}}
    if finding.modules:
        location["logicalLocations"] = [{"fullyQualifiedName": name} for name in finding.modules]
    text = f"{finding.message}; {finding.hint}" if finding.hint else finding.message
    return {
        "ruleId": finding.code,
        "ruleIndex": codes.index(finding.code),
        "level": _LEVELS[str(finding.severity)],
        "message": {"text": text},
        "locations": [location],
    }
