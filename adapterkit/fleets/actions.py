"""What can be done to every adapter of a fleet: one row each, in a process that may die."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from adapterkit.errors import AdapterKitError, WriteError, unknown
from adapterkit.fleets.limits import TimeUpError, limited

# What an adapter can be found as.
DONE, REFUSED, FAILED = "done", "refused", "failed"
# Exit code of what could not be looked at.
UNCHECKED = 5
_LONGEST = 2000

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one adapter; it crosses processes and machines.

    Attributes:
        state: `done`, `refused` for what no second try would change, or `failed`.
        exit_code: what the command would exit with.
        headline: one line for people.
        badness: worse adapters have more of it, 0 and up.
        result: the command's result, as JSON has it.
        seconds: how long it took.
    """

    state: str
    exit_code: int
    headline: str
    badness: float
    result: Mapping[str, Any]
    seconds: float | None = None


def perform(action: str, path: str, options: Options, timeout: float | None = None) -> Outcome:
    """Do one thing to one adapter; whatever goes wrong, or takes too long, is the outcome.

    Args:
        action: one of `ACTIONS`.
        path: where the adapter is.
        options: further arguments of the action.
        timeout: seconds that it may take; only in the main thread of a process.
    """
    began = time.perf_counter()
    try:
        with limited(timeout):
            exit_code, headline, badness, result = ACTIONS[action](Path(path), options)
    except TimeUpError:
        return late(timeout or 0.0)
    except AdapterKitError as error:
        state = FAILED if isinstance(error, WriteError) else REFUSED
        return _wrong(state, error, error.exit_code, began)
    except Exception as error:  # noqa: BLE001  (one adapter's fault must not end the fleet)
        return _wrong(FAILED, error, UNCHECKED, began)
    seconds = time.perf_counter() - began
    return Outcome(DONE, exit_code, headline, badness, plain(result), seconds)


def died(message: str) -> Outcome:
    """Return the outcome of an adapter that ends the process that looks at it."""
    told = {"error": {"kind": "WorkerDied", "message": message[:_LONGEST], "exit": UNCHECKED}}
    return Outcome(FAILED, UNCHECKED, f"its worker died: {message}"[:_LONGEST], math.inf, told)


def late(seconds: float) -> Outcome:
    """Return the outcome of an adapter that took longer than it may."""
    message = f"took longer than {seconds:g} s; --timeout says how long it may"
    told = {"error": {"kind": "TimeUp", "message": message, "exit": UNCHECKED}}
    return Outcome(FAILED, UNCHECKED, message, math.inf, told, seconds)


def _wrong(state: str, error: Exception, exit_code: int, began: float) -> Outcome:
    kind, message = type(error).__name__, str(error)[:_LONGEST]
    told = {"error": {"kind": kind, "message": message, "exit": exit_code}}
    if isinstance(error, AdapterKitError):  # the path stands beside it
        message = ": ".join(filter(None, (error.where, error.message)))[:_LONGEST]
    headline = message if state == REFUSED else f"{kind}: {message}"
    seconds = time.perf_counter() - began
    return Outcome(state, exit_code, headline, math.inf, told, seconds)


def plain(value: Any) -> Any:
    """Return a result as JSON has it; numbers that are none become null."""
    document = json.dumps(value, default=_as_json, ensure_ascii=True)
    return json.loads(document, parse_constant=lambda _: None)


def _as_json(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    return str(value)


_Found = tuple[int, str, float, Any]


def _inspect(path: Path, options: Options) -> _Found:
    from adapterkit.summary import inspect

    found = inspect(path, **options)
    ranks = "/".join(map(str, found.ranks)) or "none"
    headline = f"{found.format}, rank {ranks}, {found.modules} modules, base {found.base_model}"
    if found.problems:
        headline = f"{found.problems[0]}; {headline}"
    return 0, headline, float(len(found.problems)), found


def _validate(path: Path, options: Options) -> _Found:
    from adapterkit.checks.findings import Severity
    from adapterkit.validation import validate

    report = validate(path, **options)
    weights = {Severity.ERROR: 1e6, Severity.UNCHECKED: 1e3, Severity.WARNING: 1.0}
    badness = sum(weights.get(finding.severity, 0.0) for finding in report.findings)
    worst = [f for f in report.findings if f.severity in weights]
    more = f" and {len(worst) - 1} more" if len(worst) > 1 else ""
    said = f"{worst[0].severity} {worst[0].code}: {worst[0].message}{more}" if worst else "sound"
    return report.exit_code, said, badness, report


def _audit(path: Path, options: Options) -> _Found:
    from adapterkit.auditing.measure import audit

    (audited,) = audit(path, **options).adapters
    summary = audited.summary
    used = summary.utilization_mean
    headline = "no update of low rank" if used is None else f"{used:.0%} of the rank in use"
    result = {**_as_json(audited), "modules": len(audited.modules)}
    return 0, headline, 1 - (used or 0.0), result


def _convert(path: Path, options: Options) -> _Found:
    from adapterkit.conversion import convert

    given = dict(options)
    folder, suffix = Path(given.pop("folder")), given.pop("suffix")
    # Two adapters of one name get files of their own.
    mark = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = path.name if path.is_dir() else path.stem
    report = convert(path, folder / f"{name}-{mark}{suffix}", force=True, **given)
    error = report.max_relative_error
    return 0, f"{report.destination}, largest relative error {error:.3g}", error, report


def _fingerprint(path: Path, options: Options) -> _Found:
    from adapterkit.fingerprints import fingerprinted
    from adapterkit.loading import load

    found = fingerprinted(load(path, **options).adapter)
    result = {
        **asdict(found),
        "sketch": base64.b64encode(found.sketch).decode(),
        "modules": len(found.modules),
    }
    return 0, f"norm {found.norm:.4g} in {len(found.modules)} modules", 0.0, result


ACTIONS: Mapping[str, Callable[[Path, Options], _Found]] = {
    "validate": _validate,
    "audit": _audit,
    "convert": _convert,
    "inspect": _inspect,
    "fingerprint": _fingerprint,
}


def check_action(action: str, known: Sequence[str] = tuple(ACTIONS)) -> None:
    """Refuse what is no action.

    Raises:
        UsageError: if it is not; the message lists all.
    """
    if action not in known:
        raise unknown("action", action, known)
