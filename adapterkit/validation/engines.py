"""Serving engines as data: one file each in targets/, rules as conditions on facts.

A file holds `title`, `coverage` (`gguf` or `modules`: by llama.cpp tensor or Hugging Face module),
`unmatched` (`ignored` or `refused`: what the engine does with a module it does not have), `source`
and `checked` (where the rules come from, and when), optionally `losses` (code of GGUF's loss ->
code of the finding), `prepare` (exact changes that `convert --for` makes) and rules:

    code, severity (error, warning, note), when (an expression over the words of facts.py), message,
    hint, fix (name of an exact change), since and until (versions, inclusive and exclusive)
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.architectures.expressions import evaluate
from adapterkit.errors import UsageError
from adapterkit.validation.findings import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

_FOLDER = Path(__file__).parent / "targets"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of an engine; see the module's grammar."""

    code: str
    severity: Severity
    when: str
    message: str
    hint: str = ""
    fix: str = ""
    since: str = ""
    until: str = ""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One engine, at one version.

    Attributes:
        name: as `--target` takes it.
        title: as people call it.
        version: the version asked for; empty for the newest that the rules know.
        coverage: `gguf` or `modules`.
        unmatched: `ignored` or `refused`.
        source: where the rules come from.
        checked: when they were last compared with that source.
        losses: GGUF loss code -> finding code.
        prepare: exact changes that make most adapters fit.
        rules: the rules that hold for `version`.
    """

    name: str
    title: str
    version: str
    coverage: str
    unmatched: str
    source: str
    checked: str
    losses: Mapping[str, str]
    prepare: tuple[str, ...]
    rules: tuple[Rule, ...]

    def findings(self, known: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield a finding for every rule whose condition holds."""
        for rule in self.rules:
            if evaluate(rule.when, known.__getitem__):
                message = rule.message.format_map(dict(known))
                yield Finding(
                    rule.code, rule.severity, None, message, rule.hint, self.name, rule.fix
                )


def target_names() -> tuple[str, ...]:
    """Return the names of all engines, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def load_target(reference: str) -> Target:
    """Return an engine by `name` or `name@version`.

    Raises:
        UsageError: if there is no such engine; the message lists all.
    """
    name, _, version = reference.partition("@")
    if name not in target_names():
        raise UsageError(f"unknown engine {name!r}; known: {', '.join(target_names())}")
    data = _data(name)
    rules = (Rule(**{**row, "severity": Severity(row["severity"])}) for row in data.get("rule", ()))
    return Target(
        name=name,
        title=data["title"],
        version=version,
        coverage=data["coverage"],
        unmatched=data["unmatched"],
        source=data["source"],
        checked=data["checked"],
        losses=data.get("losses", {}),
        prepare=tuple(data.get("prepare", ())),
        rules=tuple(rule for rule in rules if _holds(rule, version)),
    )


@cache
def _data(name: str) -> Mapping[str, Any]:
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def _holds(rule: Rule, version: str) -> bool:
    """Tell whether a rule holds for a version; without one, those without an end do."""
    if not version:
        return not rule.until
    asked = _numbers(version)
    late = bool(rule.until) and asked >= _numbers(rule.until)
    return not late and (not rule.since or asked >= _numbers(rule.since))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
