"""Every format, of this package and of others; which one a file or folder is, by its content."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from adapterkit import strangers
from adapterkit.beside import trained_names
from adapterkit.destination import Directory
from adapterkit.errors import FormatError, NotFoundError, UnknownFormatError
from adapterkit.formats.builtin import BUILTIN
from adapterkit.formats.spec import CONFIG, FormatSpec
from adapterkit.json_file import read_json_object
from adapterkit.late import called
from adapterkit.plugins import named, plugged_in
from adapterkit.storage import alike, readable
from adapterkit.unrecognised import unrecognised

_GROUP = "adapterkit.formats"
_INDEX = "*.index.json"


def _adapter_files() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for known in formats() for name in known.files))


def _replaced_files() -> tuple[str, ...]:
    # What was trained with the adapter that was here before is not the new one's.
    from adapterkit.stamps import BESIDE

    return (*_adapter_files(), *trained_names(), BESIDE)


def directory_of(target: FormatSpec) -> Directory | None:
    """Return the kind of directory that a format is written as: any adapter's; None for a file."""
    if not target.files:
        return None
    return Directory("adapter directory", marks=_adapter_files, files=_replaced_files)


def formats() -> tuple[FormatSpec, ...]:
    """Return every format: built in, then from the entry points in group adapterkit.formats."""
    return (*BUILTIN, *plugged_in(_GROUP))


def spec(name: str) -> FormatSpec:
    """Return the format of a name.

    Raises:
        UsageError: if there is none; the message lists all.
    """
    return named("format", name, BUILTIN, _GROUP)


def detect(path: Path) -> FormatSpec:
    """Tell the format of an adapter by its content, never by its name.

    Raises:
        NotFoundError: if there is nothing at the path.
        UnknownFormatError: if no format recognises it.
        FormatError: if it is a pipe or device, or cannot be read.
    """
    with readable(path):
        if not path.exists():
            raise NotFoundError(f"no such file or directory{alike(path)}", path=path)
        if not path.is_file() and not path.is_dir():
            raise FormatError("is neither a file nor a directory", path=path)
        if path.is_file() and (left := strangers.of_training(path)):
            raise UnknownFormatError(left, path=path)
        found = _recognised(path, BUILTIN[:-1])
        # What a plug-in knows is no hand-written file.
        found = found or _recognised(path, (*plugged_in(_GROUP), BUILTIN[-1]))
        if found:
            return found
        raise unrecognised(path)


def claims(known: FormatSpec, path: Path) -> bool:
    """Tell whether a format takes a path for its own."""
    return _recognised(path, (known,)) is known


def folder_format(folder: Path, names: Iterable[str]) -> FormatSpec | None:
    """Return the format of which a folder is one adapter; None if it only holds some.

    Args:
        folder: one without adapter_config.json.
        names: of its files.
    """
    names, below = list(names), [path for path in folder.glob("*/") if path.is_dir()]
    for known in formats():
        if known.probe and (known.own_files or known.marked(names)):
            probe = called(known.probe)
            if probe(folder) and (known.marked(names) or not any(map(probe, below))):
                return known
    return None


def by_suffix(suffix: str) -> FormatSpec | None:
    """Return the format that a destination's suffix means, None if it means none."""
    suffix = suffix.lower()
    for known in BUILTIN:
        if suffix in known.suffixes:
            return known
    added: tuple[FormatSpec, ...] = plugged_in(_GROUP) if suffix else ()
    return next((known for known in added if suffix in known.suffixes), None)


def added_suffixes() -> frozenset[str]:
    """Return the file suffixes of the formats that other packages bring."""
    added: tuple[FormatSpec, ...] = plugged_in(_GROUP)
    return frozenset(suffix for known in added for suffix in known.suffixes)


def _recognised(path: Path, specs: Iterable[FormatSpec]) -> FormatSpec | None:
    start = _first_bytes(path)
    for known in specs:
        if known.magic and start.startswith(known.magic, known.magic_at):
            return known
        if known.own_files and called(known.probe)(path):
            return known
    config = _config(path)
    claims = [k for k in specs if k.config_match and _matches(config, k.config_match)]
    claims += [k for k in specs if not config.keys().isdisjoint(k.config_keys)]
    if claims:
        # Some programs write the fields of two formats, and the weights of one.
        return next((known for known in claims if _has_weights(path, known)), claims[0])
    return next((known for known in specs if known.probe and called(known.probe)(path)), None)


def _matches(config: Mapping[str, Any], wanted: Mapping[str, tuple[str, ...]]) -> bool:
    return all(
        name in config and (not values or config[name] in values) for name, values in wanted.items()
    )


def _has_weights(path: Path, known: FormatSpec) -> bool:
    folder = path if path.is_dir() else path.parent
    patterns = [name for name in known.files if name != CONFIG]
    return any(file.is_file() for name in patterns for file in folder.glob(name))


def _first_bytes(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(16)


def _config(path: Path) -> Mapping[str, Any]:
    """Return the adapter_config.json that describes a path; empty if there is none.

    It does not describe what lies beside it and is told as something else by itself.
    """
    if path.is_file() and strangers.named(path):
        own = any(fnmatch(path.name, name) for name in (*_adapter_files(), _INDEX))
        if not own:
            return {}
    folder = path if path.is_dir() else path.parent
    config = folder / CONFIG
    if not config.is_file() and path.is_dir():
        inner = sorted(path.glob(f"*/{CONFIG}"))
        config = inner[0] if inner else config
    return read_json_object(config) if config.is_file() else {}
