"""What is no adapter is named as what it is, with the next step; the names are data."""

from __future__ import annotations

import fnmatch
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.containers.safetensors import read_safetensors
from adapterkit.errors import (
    FormatError,
    NotFoundError,
    TruncatedFileError,
    UnknownFormatError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

_CONFIG = "adapter_config.json"
_LONGEST = 512
_SHOWN = 40
_SPACE = 0x20


def unknown(path: Path) -> NotFoundError | UnknownFormatError:
    """Return the error for a path that no format takes, which says what it is as far as known.

    Raises:
        TruncatedFileError: if it is a safetensors file that was cut off.
    """
    if stranger := named(path):
        return (NotFoundError if path.is_dir() else UnknownFormatError)(stranger, path=path)
    config = (path if path.is_dir() else path.parent) / _CONFIG
    if config.is_file():
        what = "says neither peft_type nor fine_tune_type, as no known program leaves it"
        return UnknownFormatError(what, path=config)
    if path.is_dir():
        what = f"no adapter here: no {_CONFIG}; pass the folder that holds it"
        return NotFoundError(what, path=path)
    beside = f"no {_CONFIG} lies beside it"
    if names := _stored_names(path):
        return UnknownFormatError(
            f"holds {len(names)} tensors ({names[0]}...) and no factor of an update, and {beside}; "
            "of a model that was trained whole, the update is found with: adapterkit extract "
            "--base BASE --tuned MODEL -o ADAPTER",
            path=path,
        )
    what = f"is not an adapter of a known format, and {beside}; pass the folder that holds one"
    return UnknownFormatError(what, path=path)


def _stored_names(path: Path) -> tuple[str, ...]:
    try:
        return tuple(read_safetensors(path).tensors)
    except FormatError as error:
        if isinstance(error, TruncatedFileError) and path.suffix == ".safetensors":
            raise
        return ()


def named(path: Path) -> str | None:
    """Return one sentence on a file or folder that no format knows, or None for a true stranger."""
    if path.is_dir():
        return next((found for rule in _table()["folder"] if (found := _folder(rule, path))), None)
    with path.open("rb") as file:
        start = file.read(_LONGEST)
    if not start:
        return "is empty; download or copy it again"
    for rule in _table()["file"]:
        known = start[rule.get("offset", 0) :].startswith(bytes.fromhex(rule.get("bytes", "00")))
        if _is_named(path, rule.get("names", ())) or ("bytes" in rule and known):
            return str(rule["what"])
    if path.suffix in _table()["weights"] and _is_text(start):
        shown = start[:_SHOWN].decode("ascii", "replace").split("\n")[0]
        return f"is text ({shown!r}), not weights; download it again, logged in if it is gated"
    return None


def _is_text(start: bytes) -> bool:
    return start.isascii() and all(byte >= _SPACE or byte in b"\t\n\r" for byte in start)


def _is_named(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)


def of_training(path: Path) -> str | None:
    """Return one sentence on a file that a training run leaves beside its adapter, or None."""
    table = _table()
    for rule in table["named"]:
        if _is_named(path, rule["names"]):
            beside = (file for name in table["adapters"] for file in sorted(path.parent.glob(name)))
            adapter = next(beside, None)
            passed = f"pass {adapter}" if adapter else "pass the adapter that the run saved"
            return f"{rule['what']}; {passed}"
    return None


def _folder(rule: dict[str, Any], path: Path) -> str | None:
    found = [next(iter(sorted(path.glob(pattern))), None) for pattern in rule["holds"]]
    first = found[0]
    if first is None or not all(found):
        return None
    file = first.relative_to(path).as_posix()
    return str(rule["what"]).replace("{file}", file).replace("{path}", str(path))


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("strangers.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
