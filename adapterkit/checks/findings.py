"""What validation says: findings with stable codes, and what an engine would do with every pair."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import UsageError
from adapterkit.notes import first_and_more

if TYPE_CHECKING:
    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet

# As advice names a command and the adapter, and a merge.
_ON_IT = re.compile(r"adapterkit [a-z]+ SRC\b")
_MERGE = re.compile(r"merge it in(?:to (?:the|a GGUF) base| PEFT)")


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
        modules: modules or tensors concerned; empty for the whole adapter.
        message: what is the case, with the values.
        hint: what to do; empty where the message says it.
        engine: engine that it is about; empty for all.
        fix: name of an exact fix that `convert --for` applies; empty without one.
    """

    code: str
    severity: Severity
    modules: tuple[str, ...]
    message: str
    hint: str = ""
    engine: str = ""
    fix: str = ""

    @property
    def where(self) -> str:
        """The first module and how many more."""
        return first_and_more(self.modules)


def named(module: str | None) -> tuple[str, ...]:
    """Return the modules of a finding about one, or about the whole adapter."""
    return (module,) if module else ()


def gathered(findings: Iterable[Finding]) -> list[Finding]:
    """Return each finding once, with all the modules that it is about."""
    modules: dict[Finding, list[str]] = {}
    for finding in findings:
        modules.setdefault(replace(finding, modules=()), []).extend(finding.modules)
    return [replace(each, modules=tuple(dict.fromkeys(m))) for each, m in modules.items()]


def advised(
    findings: Iterable[Finding], adapter: AdapterTensorSet | None, base: BaseModel | None
) -> Iterator[Finding]:
    """Yield findings whose advice can be followed.

    It has the options without which the adapter is not read, and does not say to merge what no
    weights of the base can hold.
    """
    source = adapter.provenance if adapter is not None else None
    given = "".join(f" {option}" for option in (source.options if source else ()))
    instead = _instead_of_merging(adapter, base) if adapter is not None else None
    for finding in findings:
        hint = _ON_IT.sub(lambda found: found[0] + given, finding.hint)
        if instead is not None and (merging := _MERGE.search(hint)):
            hint = (
                instead
                if adapter and adapter.invocation_tokens
                else hint[: merging.start()] + instead
            )
        yield replace(finding, hint=hint)


def _instead_of_merging(adapter: AdapterTensorSet, base: BaseModel | None) -> str | None:
    """Return what to do with an adapter that cannot be merged; None for all others."""
    from adapterkit.base.heads import without_bias

    if adapter.invocation_tokens:
        return (
            "serve it with PEFT: it acts after its invocation tokens alone "
            "(alora_invocation_tokens), which neither a plain LoRA nor merged weights do"
        )
    if without_bias(adapter, base):
        return "serve it with PEFT: the base has no bias that those on B could be merged into"
    return None


class Outcome(StrEnum):
    """What an engine does with a pair of factors."""

    APPLIED = "applied"
    IGNORED = "ignored"
    REFUSED = "refused"
    UNMATCHED = "unmatched"


class Verdict(StrEnum):
    """What an engine does with an adapter; refusals come before what happens later.

    `garbage` is loaded and computed with, and what comes out is chance, or the end of the process;
    `altered` is another update than the file's.
    """

    REFUSED = "refused"
    ABORTS = "aborts"
    GARBAGE = "garbage"
    NOTHING = "no effect"
    ALTERED = "altered"
    PARTLY = "partly applied"
    APPLIED = "applied"


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


def known_code(code: str) -> str:
    """Return a code as it is written, in whatever case it is given.

    Raises:
        UsageError: if there is none; the message names those that look like it, or all.
    """
    known = explanations()
    if code.upper() in known:
        return code.upper()
    close = get_close_matches(code.upper(), known)
    told = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
    raise UsageError(f"unknown code {code!r}; {told}")


@cache
def explanations() -> Mapping[str, Explanation]:
    """Return the explanation of every code, from codes.toml."""
    text = (Path(__file__).parent / "codes.toml").read_text(encoding="utf-8")
    return {code: Explanation(code, **fields) for code, fields in tomllib.loads(text).items()}
