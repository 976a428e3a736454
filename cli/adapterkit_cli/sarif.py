"""Validation reports as SARIF 2.1.0 (OASIS), the format of code scanners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import adapterkit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit import Attempt, Finding, ValidationReport

_LEVELS = {"error": "error", "unchecked": "warning", "warning": "warning", "note": "note"}
_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_CONFIG = "adapter_config.json"
# What stands for an adapter that could not be read at all, and so has no findings.
_UNREADABLE = "unreadable"
_UNREADABLE_RULE: dict[str, object] = {
    "id": _UNREADABLE,
    "shortDescription": {"text": "An adapter that cannot be read"},
    "fullDescription": {"text": "The file is missing, malformed, or no adapter of a known format."},
    "help": {"text": "The message says what is wrong, and where."},
}


def document(attempts: Sequence[Attempt[ValidationReport]]) -> str:
    """Return all reports as one SARIF run; what could not be read is a result too."""
    found = [(o.source, f) for o in attempts if o.result for f in o.result.findings]
    codes = list(dict.fromkeys(finding.code for _, finding in found))
    rules = [_rule(code) for code in codes]
    results = [_result(finding, source, codes) for source, finding in found]
    results += [_unreadable(a, len(codes)) for a in attempts if a.error is not None]
    if any(attempt.error is not None for attempt in attempts):
        rules.append(_UNREADABLE_RULE)
    driver = {"name": "adapterkit", "version": adapterkit.__version__, "rules": rules}
    run = {"tool": {"driver": driver}, "results": results}
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]})


def _unreadable(attempt: Attempt[ValidationReport], rule: int) -> dict[str, object]:
    return {
        "ruleId": _UNREADABLE,
        "ruleIndex": rule,
        "level": "error",
        "message": {"text": attempt.message},
        "locations": [_location(attempt.source)],
    }


def _rule(code: str) -> dict[str, object]:
    from adapterkit import explanations

    known = explanations()[code]
    return {
        "id": code,
        "shortDescription": {"text": known.title},
        "fullDescription": {"text": f"{known.meaning} {known.matters}"},
        "help": {"text": known.action},
    }


def _location(path: str) -> dict[str, object]:
    """Return where something is; an absolute path is a file URI, as SARIF has it (RFC 3986).

    GitHub shows a result beside a line of a file, and none without either.
    """
    file = _file(Path(path))
    # Half surrogate pairs, which file names may hold, stand as the bytes that they are.
    uri = quote(str(file), safe="/:@", encoding="utf-8", errors="surrogateescape")
    uri = f"file://{uri}" if file.is_absolute() else uri
    return {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}}


def _file(path: Path) -> Path:
    """Return the file that stands for an adapter: of a directory its config, else its first."""
    try:
        files = sorted(each for each in path.iterdir() if each.is_file())
    except OSError:
        return path
    return next((each for each in files if each.name == _CONFIG), files[0] if files else path)


def _result(finding: Finding, path: str, codes: list[str]) -> dict[str, object]:
    location = _location(path)
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
