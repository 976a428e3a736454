"""A certificate: what an adapter file was made from and what it holds, for the file to carry."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.base.identity import BaseIdentity, identified
from adapterkit.errors import FormatError
from adapterkit.fingerprints import Fingerprint, ModuleFingerprint, fingerprinted
from adapterkit.stamps import LONGEST, Contents, sha256
from adapterkit.tables import ANY_MAPPING, Table, listed, mapped, number, text, whole

if TYPE_CHECKING:
    from adapterkit.base.model import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet

# Certificates of the first version have no seal.
_SCHEMA, _UNSEALED = 2, 1
# Larger sources are models, whose files are not read once more for this.
_MOST_BYTES = 1 << 30
_SEAL = "seal"
_NAME = text(1 << 12, empty=False)
_LONGEST_OPTION = 1 << 9
_SHORT = text(_LONGEST_OPTION)
_LENGTH = number(0)
_NORM = struct.Struct("<d")
# 16 numbers of float16.
_SKETCH = 32
# Letters of a number, at most.
_FLOAT = 32


@dataclass(frozen=True, slots=True)
class Making:
    """What a file is made by.

    Attributes:
        command: that makes it.
        options: of the command, as far as the result depends on them; None for what was not said.
        sources: files and directories that it is made from.
    """

    command: str
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    sources: Sequence[Path] = ()

    def told(self) -> dict[str, object]:
        """Return how a certificate begins."""
        said = {k: v for k, v in self.options.items() if v is not None and v is not False}
        options = {
            k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in said.items()
        }
        return {
            "schema": _SCHEMA,
            "adapterkit": str(import_module("adapterkit").__version__),
            "command": self.command,
            "options": {name: value[:_LONGEST_OPTION] for name, value in options.items()},
            "sources": _digests(self.sources),
        }


def _digests(sources: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of what is small enough, by last names; equal names get a number."""
    found: dict[str, str] = {}
    for path in sources:
        if digest := source_digest(path):
            name, number = path.name, 1
            while found.get(name, digest) != digest:
                number += 1
                name = f"{path.name} ({number})"
            found[name] = digest
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was known of a file when it was written.

    Attributes:
        version: of adapterkit that wrote it.
        command: of adapterkit that wrote it.
        sources: sha256 of what it was made from, by its last name; empty for what is too large or
            was made in memory.
        max_relative_error: of any module, measured against what was to be written.
        options: those of the command, outtype and layout among them.
        base: the base model, if one was known.
        fingerprint: of its updates; without modules where there were too many to list. None for a
            model.
        adapters: those of the adapters that were merged into a model, by name.
        contents: hashes of its tensors, by `mark`, and of its settings; empty where there were too
            many to list.
        digest: the sha256 of all those hashes.
    """

    version: str
    command: str
    sources: Mapping[str, str]
    max_relative_error: float
    options: Mapping[str, str]
    base: BaseIdentity | None
    fingerprint: Fingerprint | None
    adapters: Mapping[str, Fingerprint]
    contents: Contents
    digest: str


def certified(
    written: AdapterTensorSet, options: FormatOptions, *, error: float, making: Making
) -> Callable[[Contents], str]:
    """Return what the certificate of a file is, given hashes of all that the file holds.

    It is JSON, no longer than a stamp may be.

    Args:
        written: the adapter as it was read back.
        options: what it was written with.
        error: the largest relative error of a module.
        making: what it was made by and from.
    """
    fingerprint = fingerprinted(written)
    stored = {"outtype": options.dtype and options.dtype.value, "moe_layout": options.moe_layout}
    document = {
        **replace(making, options={**stored, **making.options}).told(),
        "max_relative_error": error,
        "base": asdict(identified(options.base)) if options.base else None,
        "fingerprint": _in_brief(fingerprint),
    }
    modules = {
        name: _text(_NORM.pack(module.norm) + module.sketch)
        for name, module in fingerprint.modules.items()
    }

    def told(found: Contents) -> str:
        details = {"modules": modules, **_listed(found)}
        return _fitting({**document, "digest": found.digest}, details, {})

    return told


class ModelProof:
    """What a model with adapters merged into it is made from, known before it is written."""

    def __init__(
        self, making: Making, base: BaseModel, adapters: Mapping[str, AdapterTensorSet]
    ) -> None:
        """Look at what it is made from.

        Args:
            making: what it is made by and from.
            base: the model that the updates are added to.
            adapters: as they are given, by names of their own.
        """
        prints = {name: fingerprinted(adapter) for name, adapter in adapters.items()}
        self._document = {
            **making.told(),
            "base": asdict(identified(base)),
            "adapters": {name: _in_brief(each) for name, each in prints.items()},
        }

    def text(self, found: Contents, error: float) -> str:
        """Return the certificate as JSON that is no longer than a stamp may be.

        Args:
            found: hashes of all that the model holds.
            error: the largest error of rounding, as a share of the update that was added.
        """
        document = {**self._document, "max_relative_error": error, "digest": found.digest}
        return _fitting(document, _listed(found), {"adapters": {}})

    def room(self, tensors: Iterable[str], settings: Iterable[str]) -> int:
        """Return how many letters the text of a model with these names has at most."""
        hashes = (dict.fromkeys(names, "0" * 16) for names in (tensors, settings))
        return min(len(self.text(Contents(*hashes), 0.0)) + _FLOAT, LONGEST)


def _in_brief(fingerprint: Fingerprint) -> dict[str, object]:
    return {
        "version": fingerprint.version,
        "norm": fingerprint.norm,
        "sketch": _text(fingerprint.vector.astype("<f2").tobytes()),
        "unplaced": list(fingerprint.unplaced),
    }


def _listed(found: Contents) -> dict[str, object]:
    tensors = {mark(name): digest for name, digest in found.tensors.items()}
    return {"tensors": tensors, "settings": found.settings}


def _fitting(
    document: Mapping[str, object], details: Mapping[str, object], without: Mapping[str, object]
) -> str:
    """Return a document with all of its details that fit, and without some of its own if not."""
    choices = ({**document, **details}, document, {**document, **without})
    texts = [_sealed(json.dumps(each, separators=(",", ":"))) for each in choices]
    return next((text for text in texts if len(text) <= LONGEST), texts[-1])


def _sealed(document: str) -> str:
    """Return a JSON object with one more field, the sha256 of all that stands before it."""
    return f'{document[:-1]},"{_SEAL}":"{hashlib.sha256(document.encode()).hexdigest()}"}}'


def _check_seal(document: str, path: Path) -> None:
    """Raise unless a certificate is as it was written, to the letter."""
    before, found, _ = document.rpartition(f',"{_SEAL}":"')
    if not found or _sealed(before + "}") != document:
        message = "its proof is not as it was written, and nothing can be told by it"
        raise FormatError(message, path=path)


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
        FormatError: if it is malformed, of a later version, or not as it was written.
    """
    try:
        fields: Any = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its proof is not readable JSON ({error})", path=path) from None
    if not isinstance(fields, dict):
        raise FormatError("its proof is not a JSON object", path=path)
    table = Table(cast("dict[str, Any]", fields), path, "proof")
    schema = table.get("schema", whole(1, 1 << 20))
    if schema not in {_SCHEMA, _UNSEALED}:
        raise FormatError(f"its proof is of version {schema}, known is {_SCHEMA}", path=path)
    if schema == _SCHEMA or _SEAL in fields:
        _check_seal(document.removesuffix("\n").rstrip(" "), path)
    hashes, merged = mapped(text(64)), table.table("adapters")
    known: dict[str, Table] = {}
    if merged is not None:
        known = {name: merged.inner(name, merged.get(name, ANY_MAPPING)) for name in merged.fields}
    return Certificate(
        version=table.get("adapterkit", _SHORT),
        command=table.get("command", _SHORT, ""),
        sources=table.get("sources", hashes),
        max_relative_error=table.get("max_relative_error", _LENGTH),
        options=table.get("options", mapped(_SHORT)),
        base=_base(table.table("base")),
        fingerprint=_listed_fingerprint(table, path) if merged is None else None,
        adapters={name: _fingerprint(each, path) for name, each in known.items()},
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


def _listed_fingerprint(table: Table, path: Path) -> Fingerprint:
    modules: dict[str, ModuleFingerprint] = {}
    for name, letters in table.get("modules", mapped(text(64)), dict[str, str]()).items():
        data = _bytes(letters, _NORM.size + _SKETCH, path)
        (norm,) = _NORM.unpack_from(data)
        modules[name] = ModuleFingerprint(norm, data[_NORM.size :])
    inner = table.table("fingerprint") or table.inner("fingerprint", {})
    return replace(_fingerprint(inner, path), modules=modules)


def _fingerprint(table: Table, path: Path) -> Fingerprint:
    import numpy as np

    from adapterkit.lowrank.fingerprints import SIZE

    vector = np.frombuffer(_bytes(table.get("sketch", text(LONGEST)), 2 * SIZE, path), "<f2")
    return Fingerprint(
        version=table.get("version", whole(1, 1 << 20)),
        norm=table.get("norm", _LENGTH),
        sketch=vector.astype("<f4").tobytes(),
        modules={},
        unplaced=table.get("unplaced", listed(_NAME), ()),
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
