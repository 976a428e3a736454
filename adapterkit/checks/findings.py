"""What validation says: findings with stable codes, and what an engine would do with every pair."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path


class Severity(StrEnum):
    """How bad a finding is: errors and unchecked things change the exit code."""

    ERROR = "error"
    UNCHECKED = "unchecked"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or could not be looked at.

    Attributes:
        code: stable code, explained by `adapterkit validate --explain CODE`.
        severity: how bad it is.
        module: module or tensor concerned; None for the whole adapter.
        message: what is the case, with the values.
        hint: what to do; empty where the message says it.
        target: engine that it is about; empty for all.
        fix: name of an exact fix that `convert --for` applies; empty without one.
    """

    code: str
    severity: Severity
    module: str | None
    message: str
    hint: str = ""
    target: str = ""
    fix: str = ""


class Outcome(StrEnum):
    """What an engine does with a pair of factors."""

    APPLIED = "applied"
    IGNORED = "ignored"
    REFUSED = "refused"
    UNMATCHED = "unmatched"


@dataclass(frozen=True, slots=True)
class CoveredModule:
    """One module on one engine.

    Attributes:
        module: Hugging Face path.
        outcome: what the engine does with it.
        tensor: the engine's tensor that it lands on, if any.
        reason: why it is not applied; empty if it is.
    """

    module: str
    outcome: Outcome
    tensor: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a code means, for `--explain`."""

    code: str
    title: str
    meaning: str
    matters: str
    action: str


@cache
def explanations() -> Mapping[str, Explanation]:
    """Return the explanation of every code, from codes.toml."""
    text = (Path(__file__).parent / "codes.toml").read_text(encoding="utf-8")
    return {code: Explanation(code, **fields) for code, fields in tomllib.loads(text).items()}
