"""A certificate: what an adapter file was made from and what it holds, for the file to carry."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.base.identity import BaseIdentity, identified
from adapterkit.errors import FormatError
from adapterkit.fingerprints import Fingerprint, ModuleFingerprint, fingerprinted
from adapterkit.stamps import LONGEST, Contents, sha256
from adapterkit.tables import Table, listed, mapped, number, text, whole

if TYPE_CHECKING:
    from adapterkit.formats.protocol import Options
    from adapterkit.model import AdapterTensorSet

_SCHEMA = 1
# Larger sources are models, whose files are not read once more for this.
_MOST_BYTES = 1 << 30
_NAME = text(1 << 12, empty=False)
_SHORT = text(1 << 9)
_LENGTH = number(0)
_NORM = struct.Struct("<d")
# 16 numbers of float16.
_SKETCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was known of a file when it was written.

    Attributes:
        version: of adapterkit that wrote it.
        sources: sha256 of what it was made from, by its last name; empty for what is too large or
            was made in memory.
        max_relative_error: of any module, measured against what was to be written.
        options: outtype and layout it was written with.
        base: the base model, if one was known.
        fingerprint: of its updates; without modules where there were too many to list.
        contents: hashes of its tensors, by `mark`, and of its settings; empty where there were too
            many to list.
        digest: the sha256 of all those hashes.
    """

    version: str
    sources: Mapping[str, str]
    max_relative_error: float
    options: Mapping[str, str]
    base: BaseIdentity | None
    fingerprint: Fingerprint
    contents: Contents
    digest: str


def certified(
    written: AdapterTensorSet,
    found: Contents,
    options: Options,
    *,
    error: float,
    sources: Iterable[Path],
) -> str:
    """Return the certificate of a file as JSON that is no longer than a stamp may be.

    Args:
        written: the adapter as it was read back.
        found: hashes of all that the file holds.
        options: what it was written with.
        error: the largest relative error of a module.
        sources: what it was made from.
    """
    fingerprint = fingerprinted(written)
    told = {"outtype": options.dtype and options.dtype.value, "moe_layout": options.moe_layout}
    document = {
        "schema": _SCHEMA,
        "adapterkit": str(import_module("adapterkit").__version__),
        "sources": {path.name: digest for path in sources if (digest := source_digest(path))},
        "max_relative_error": error,
        "options": {name: value for name, value in told.items() if value},
        "base": asdict(identified(options.base)) if options.base else None,
        "fingerprint": {
            "version": fingerprint.version,
            "norm": fingerprint.norm,
            "sketch": _text(fingerprint.vector.astype("<f2").tobytes()),
            "unplaced": list(fingerprint.unplaced),
        },
        "digest": found.digest,
    }
    details = {
        "modules": {
            name: _text(_NORM.pack(module.norm) + module.sketch)
            for name, module in fingerprint.modules.items()
        },
        "tensors": {mark(name): digest for name, digest in found.tensors.items()},
        "settings": found.settings,
    }
    full = json.dumps({**document, **details}, separators=(",", ":"))
    return full if len(full) <= LONGEST else json.dumps(document, separators=(",", ":"))


def source_digest(path: Path) -> str | None:
    """Return the sha256 of a file, or that of the names and sha256 of a directory's files.

    None is returned for what is too large or not there.
    """
    files = [p for p in sorted(path.iterdir()) if p.is_file()] if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        return None
    if sum(file.stat().st_size for file in files) > _MOST_BYTES:
        return None
    if not path.is_dir():
        return sha256(path)
    lines = "".join(f"{file.name} {sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode(errors="replace")).hexdigest()


def mark(name: str) -> str:
    """Return what stands for a tensor's name in a certificate: short, since there are many."""
    return hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8]


def read_certificate(document: str, path: Path) -> Certificate:
    """Read what a file carries.

    Raises:
        FormatError: if it is malformed, or of a later version.
    """
    try:
        fields: Any = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its proof is not readable JSON ({error})", path=path) from None
    if not isinstance(fields, dict):
        raise FormatError("its proof is not a JSON object", path=path)
    table = Table(cast("dict[str, Any]", fields), path, "proof")
    if (schema := table.get("schema", whole(1, 1 << 20))) != _SCHEMA:
        raise FormatError(f"its proof is of version {schema}, known is {_SCHEMA}", path=path)
    hashes = mapped(text(64))
    return Certificate(
        version=table.get("adapterkit", _SHORT),
        sources=table.get("sources", hashes),
        max_relative_error=table.get("max_relative_error", _LENGTH),
        options=table.get("options", mapped(_SHORT)),
        base=_base(table.table("base")),
        fingerprint=_fingerprint(table, path),
        contents=Contents(
            table.get("tensors", hashes, dict[str, str]()),
            table.get("settings", hashes, dict[str, str]()),
        ),
        digest=table.get("digest", text(64)),
    )


def _base(table: Table | None) -> BaseIdentity | None:
    if table is None:
        return None
    return BaseIdentity(
        kind=table.get("kind", _SHORT),
        name=table.optional("name", _NAME),
        config=table.get("config", _SHORT),
        weights=table.get("weights", _SHORT),
    )


def _fingerprint(table: Table, path: Path) -> Fingerprint:
    import numpy as np

    from adapterkit.lowrank.fingerprints import SIZE

    inner = table.table("fingerprint") or table.inner("fingerprint", {})
    vector = np.frombuffer(_bytes(inner.get("sketch", text(LONGEST)), 2 * SIZE, path), "<f2")
    modules: dict[str, ModuleFingerprint] = {}
    for name, letters in table.get("modules", mapped(text(64)), dict[str, str]()).items():
        data = _bytes(letters, _NORM.size + _SKETCH, path)
        (norm,) = _NORM.unpack_from(data)
        modules[name] = ModuleFingerprint(norm, data[_NORM.size :])
    return Fingerprint(
        version=inner.get("version", whole(1, 1 << 20)),
        norm=inner.get("norm", _LENGTH),
        sketch=vector.astype("<f4").tobytes(),
        modules=modules,
        unplaced=inner.get("unplaced", listed(_NAME), ()),
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(letters: str, count: int, path: Path) -> bytes:
    try:
        data = base64.b64decode(letters, validate=True)
    except (ValueError, binascii.Error):
        data = b""
    if len(data) != count:
        raise FormatError(f"a sketch in its proof has {len(data)} bytes, not {count}", path=path)
    return data
