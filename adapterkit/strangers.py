"""What is no adapter is named as what it is, with the next step; the names are data."""

from __future__ import annotations

import fnmatch
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

# What is to be passed as a base model.
BASE = "pass a model's directory, its config.json or its GGUF file"
_LONGEST = 512
_SHOWN = 40
_SPACE = 0x20
_BLANK = b"\xef\xbb\xbf \t\r\n"


def named(path: Path, *, base: bool = False) -> str | None:
    """Return one sentence on a file or folder that no format knows, or None for a true stranger.

    Args:
        path: what was passed.
        base: whether it was passed as a base model, and not as an adapter.
    """
    if path.is_dir():
        return next((found for rule in _table()["folder"] if (found := _folder(rule, path))), None)
    start = _start(path)
    if not start:
        return _EMPTY
    rules = [*(_table()["named"] if base else ()), *_table()["file"]]
    found = (rule for rule in rules if _is_named(path, rule) or _begins(start, path, rule))
    rule = next(found, None)
    return _said(rule, base=base) if rule else _as_text(start, path)


def content(path: Path, *, weights: bool = True) -> str | None:
    """Return one sentence on a file that is not what its name says, told by its bytes alone.

    Args:
        path: what was read.
        weights: whether it was read as weights, which are no text.
    """
    start = _start(path)
    if not start:
        return _EMPTY
    rule = next((r for r in _table()["file"] if _begins(start, path, r)), None)
    if rule:
        return _said(rule, base=False)
    return _as_text(start, path) or (_TEXT if weights and _is_text(start) else None)


def holding(names: Collection[str]) -> str | None:
    """Return one sentence on a file of tensors that no format knows, told by their names."""
    for rule in _table()["tensors"]:
        held = all(fnmatch.filter(names, pattern) for pattern in rule["holds"])
        only = rule.get("only", ["*"])
        if held and all(_is_like(name, only) for name in names):
            return _said(rule, base=False)
    return None


def pickled(asks: str) -> str | None:
    """Return one sentence on a pickle, told by the class or function that it asks for, or None."""
    rule = next((r for r in _table()["pickled"] if _is_like(asks, r["asks"])), None)
    return _said(rule, base=False).replace("{asks}", asks) if rule else None


def of_training(path: Path) -> str | None:
    """Return one sentence on a file that a training run leaves beside its adapter, or None."""
    table = _table()
    for rule in table["named"]:
        if _is_named(path, rule):
            beside = (file for name in table["adapters"] for file in sorted(path.parent.glob(name)))
            adapter = next(beside, None)
            passed = f"pass {adapter}" if adapter else "pass the adapter that the run saved"
            return f"{rule['what']}, not an adapter; {passed}"
    return None


_EMPTY = "is empty; download or copy it again"
_TEXT = "is text, not weights; pass the folder, or the file of weights in it"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_LONGEST)


def _said(rule: dict[str, Any], *, base: bool) -> str:
    step = rule.get("do") or (BASE if base else rule["adapter"])
    return f"{rule['what']}; {step}"


def _begins(start: bytes, path: Path, rule: dict[str, Any]) -> bool:
    """Tell whether a file has the bytes of a rule where they belong; blanks may stand before."""
    if "bytes" not in rule or _is_like(path.name, rule.get("unless", ())):
        return False
    known, offset = bytes.fromhex(rule["bytes"]), rule.get("offset", 0)
    return any(begin[offset:].startswith(known) for begin in (start, start.lstrip(_BLANK)))


def _as_text(start: bytes, path: Path) -> str | None:
    if path.suffix not in _table()["weights"] or not _is_text(start):
        return None
    shown = start.strip(_BLANK)[:_SHOWN].decode("ascii", "replace").split("\n")[0]
    return f"is text ({shown!r}), not weights; download it again, logged in if it is gated"


def _is_text(start: bytes) -> bool:
    return start.isascii() and all(byte >= _SPACE or byte in b"\t\n\r" for byte in start)


def _is_named(path: Path, rule: dict[str, Any]) -> bool:
    return _is_like(path.name, rule.get("names", ()))


def _is_like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _folder(rule: dict[str, Any], path: Path) -> str | None:
    found = [next(iter(sorted(path.glob(pattern))), None) for pattern in rule["holds"]]
    first = found[0]
    if first is None or not all(found):
        return None
    file = first.relative_to(path)
    parts = {
        "{file}": file.as_posix(),
        "{folder}": file.parent.as_posix(),
        "{quoted}": shlex.quote(str(path)),
        "{path}": str(path),
    }
    said = _said(rule, base=False)
    for mark, part in parts.items():
        said = said.replace(mark, part)
    return said


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("strangers.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
