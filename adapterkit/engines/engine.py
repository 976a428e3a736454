"""Serving engines as data: one file each beside this one, rules as conditions on facts.

A file holds `title`, `coverage` (`gguf`, `modules` or `names`: by llama.cpp tensor, Hugging Face
module, or how a file of a diffusion model spells it; for the last there are rows of names.py),
`unmatched` (`ignored` or `refused`: what the engine does with a module it does not have), `source`
and `checked` (where the rules come from, and when), optionally `like` (another engine, whose
file holds what this one does not), `models` (the engine whose list of models holds, if it is not
the one that it is like), `wrapped` (`exact` if modules count only under the very path of the base's
class, `loaded` if only under what PEFT leads there), `whole` (whether a kind of module counts only
where every layer has it), `within` (an expression that the paths of the modules that it looks at
have), `strangers` (`refused` if it refuses a module by whose last name the base has none),
`losses` (code of GGUF's loss -> code of the finding), `effects` (code of a finding -> what becomes
of the file; with a row `error` that is for every other error, only errors count), `prepare` (exact
changes that `convert --for` makes) and rules:

    code, severity (error, warning, note), when (an expression over the words of facts.py), message
    and hint (which may name these, and the engine as `title` and `engine`), fix (name of an exact
    change), flag (what the engine must be started with), outcome (what it makes of every module),
    since and until (versions, inclusive and exclusive)
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from adapterkit.architectures.expressions import evaluate
from adapterkit.checks.findings import Finding, Outcome, Severity, Verdict
from adapterkit.errors import UsageError, unknown

# Release numbers with what follows them (0.33.0rc1), and llama.cpp's builds (b9549).
_VERSION = re.compile(r"[bv]?\d+(\.\d+)*([-+.]?[a-z]\w*)?")
_NUMBER = re.compile(r"(?<![a-z\d])[bv]?(\d+)")
# A step of `prepare` that means a format: `to-gguf`.
_TO = "to-"
# The effect of an error that `effects` does not name.
_ERROR = "error"
# What findings of single modules come to is told module by module: no layer, expert or module of
# that name in the base, and the headlines of what is done with modules.
_OF_MODULES = {"AK302", "AK303", "AK501", "AK502", "AK503"}
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRule:
    """One rule of an engine; see the module's grammar."""

    code: str
    severity: Severity
    when: str
    message: str
    hint: str = ""
    fix: str = ""
    flag: str = ""
    outcome: str = ""
    since: str = ""
    until: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class NameRule:
    """What a loader makes of modules that are spelled in some way; see names.py."""

    outcome: str
    code: str = ""
    severity: Severity = Severity.ERROR
    families: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    when: str = "1"
    message: str = ""
    hint: str = ""
    fix: str = ""
    after: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Target:
    """One engine, at one version.

    Attributes:
        name: as `--target` takes it.
        title: as people call it.
        version: the version asked for; empty for the newest that the rules know.
        coverage: `gguf`, `modules` or `names`.
        unmatched: `ignored` or `refused`.
        source: where the rules come from.
        checked: when they were last compared with that source.
        wrapped: `exact`, `loaded` or `any`: whether a module counts under its own path only, or
            under what PEFT makes of the names of a file.
        whole: whether a kind of module counts only where every layer has it.
        within: what is in the paths of the modules that it looks at; empty for all.
        strangers: `refused` if it refuses a module by whose last name the base has none; else what
            is true of all that it does not have.
        models: the engine whose list of models holds for it.
        losses: GGUF loss code -> finding code.
        effects: finding code -> what becomes of the file.
        prepare: exact changes that `convert --for` makes, those of `rules` included.
        rules: the rules that hold for `version`.
        names: what becomes of modules by their names, the first that fits; empty for other
            engines.
    """

    name: str
    title: str
    version: str
    coverage: str
    unmatched: str
    source: str
    checked: str
    wrapped: str
    whole: bool
    within: str
    strangers: str
    models: str
    losses: Mapping[str, str]
    effects: Mapping[str, Verdict]
    prepare: tuple[str, ...]
    rules: tuple[EngineRule, ...]
    names: tuple[NameRule, ...] = ()

    def __repr__(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"<Target: {self.title}{version}, {len(self.rules)} rules, checked {self.checked}>"

    @property
    def format(self) -> str | None:
        """Name of the format that the engine loads, where it needs another than it is given."""
        names = (step.removeprefix(_TO) for step in self.prepare if step.startswith(_TO))
        return next(names, None)

    @property
    def changes(self) -> tuple[str, ...]:
        """Names of the passes that the engine needs, beside another format."""
        return tuple(step for step in self.prepare if not step.startswith(_TO))

    def outcome(self, known: Mapping[str, Any]) -> tuple[Outcome, str] | None:
        """Return what the rules make of every module, and why; None if that depends on it."""
        for rule in self.rules:
            if rule.outcome and evaluate(rule.when, known.__getitem__):
                return Outcome(rule.outcome), self._told(rule.message, known)
        return None

    def flags(self, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what the engine must be started with for an adapter, beside its name."""
        needed = (r.flag for r in self.rules if r.flag and evaluate(r.when, known.__getitem__))
        return tuple(dict.fromkeys(needed))

    def fate(self, finding: Finding) -> Verdict | None:
        """Return what a finding makes of the file; None for nothing, or nothing that is known."""
        if finding.severity is Severity.ERROR:
            every = None if finding.code in _OF_MODULES else self.effects.get(_ERROR)
            return self.effects.get(finding.code, every)
        return None if _ERROR in self.effects else self.effects.get(finding.code)

    def findings(self, known: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield a finding for every rule whose condition holds."""
        for rule in self.rules:
            if evaluate(rule.when, known.__getitem__):
                message, hint = self._told(rule.message, known), self._told(rule.hint, known)
                yield Finding(rule.code, rule.severity, (), message, hint, self.name, rule.fix)

    def _told(self, text: str, known: Mapping[str, Any]) -> str:
        return text.format_map({**known, "title": self.title, "engine": self.name})


def target_names() -> tuple[str, ...]:
    """Return the names of all engines, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def load_target(engine: str) -> Target:
    """Return an engine by `name` or `name@version`.

    Raises:
        UsageError: if there is no such engine; the message lists all.
    """
    name, at, version = engine.partition("@")
    if name not in target_names():
        raise unknown("engine", name, target_names())
    if at and not _VERSION.fullmatch(version):
        raise UsageError(f"{engine!r} names no version; write for example {name}@1.2.3")
    data = _data(name)
    if "like" in data:
        data = {**_data(data["like"]), **data}
    every = (
        EngineRule(**{**row, "severity": Severity(row["severity"])}) for row in data.get("rule", ())
    )
    rules = tuple(rule for rule in every if _holds(rule, version))
    fixes = [*data.get("prepare", ()), *(rule.fix for rule in rules if rule.fix)]
    return Target(
        name=name,
        models=data.get("models", data.get("like", name)),
        title=data["title"],
        version=version,
        coverage=data["coverage"],
        unmatched=data["unmatched"],
        source=data["source"],
        checked=data["checked"],
        wrapped=data.get("wrapped", "any"),
        whole=data.get("whole", False),
        within=data.get("within", ""),
        strangers=data.get("strangers", data["unmatched"]),
        losses=data.get("losses", {}),
        effects={code: Verdict(effect) for code, effect in data.get("effects", {}).items()},
        prepare=tuple(dict.fromkeys(fixes)),
        rules=rules,
        names=tuple(map(_name_rule, data.get("name", ()))),
    )


def _name_rule(row: Mapping[str, Any]) -> NameRule:
    fields: dict[str, Any] = {
        key: tuple(cast("list[str]", value)) if isinstance(value, list) else value
        for key, value in row.items()
    }
    fields["severity"] = Severity(row.get("severity", Severity.ERROR))
    return NameRule(**fields)


@cache
def _data(name: str) -> Mapping[str, Any]:
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def _holds(rule: EngineRule, version: str) -> bool:
    """Tell whether a rule holds for a version; without one, those without an end do."""
    if not version:
        return not rule.until
    asked = _numbers(version)
    late = bool(rule.until) and asked >= _numbers(rule.until)
    return not late and (not rule.since or asked >= _numbers(rule.since))


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a release; 0.33 is 0.33.0, and pre-releases are that release."""
    numbers = [int(part) for part in _NUMBER.findall(version)]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
