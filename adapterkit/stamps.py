"""Where a file carries what was written about it, and a short hash of everything else in it.

The header of safetensors and GGUF has room for free text that loaders pass over; for every other
file it is a small file in the same directory. Nothing is added to adapter_config.json: PEFT warns
of fields that it does not know.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.containers.gguf import GGUFArray, GGUFFile, read_gguf, write_gguf
from adapterkit.containers.safetensors import read_safetensors, write_safetensors
from adapterkit.errors import AdapterKitError, FormatError, ProofError
from adapterkit.json_file import read_json_object
from adapterkit.storage import FileSlice, read_document, readable
from adapterkit.work import in_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from adapterkit.containers.gguf import GGUFValue
    from adapterkit.tensor import LazyTensor

# What names of metadata of our own begin with: no format carries them on as the user's text.
OURS = "adapterkit."
KEY = f"{OURS}proof"
BESIDE = "adapterkit-proof.json"
# Loaders read the whole header each time; a text that is longer is no proof.
LONGEST = 1 << 16
_BLOCK = 1 << 20
_GGUF, _SAFETENSORS = b"GGUF", ".safetensors"
# What `write_gguf` writes.
_GGUF_VERSION = 3
# The type of a text in the metadata of GGUF.
_STRING = 8
# The weights of a directory, by format.
_MAIN = ("adapter_model.safetensors", "adapters.safetensors")
# What may be added to a directory without changing the adapter.
_INDEX = ".safetensors.index.json"
_NOTES = {".md", ".txt", ".log"}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file or directory holds, apart from its stamp; hashes are 16 digits of a sha256.

    Attributes:
        tensors: hash of the type, shape and bytes of each tensor, by its stored name.
        settings: hash of each key of the headers and of JSON files, and of every other file.
    """

    tensors: Mapping[str, str]
    settings: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The sha256 of all of them, sorted."""
        lines = (f"{k}\0{v}\n" for each in (self.tensors, self.settings) for k, v in each.items())
        return hashlib.sha256("".join(sorted(lines)).encode(errors="replace")).hexdigest()


def stamp(path: Path, text: str) -> None:
    """Write a text into the header of a file, or of a directory's weights, or beside them.

    Args:
        path: what nobody else uses yet.
        text: at most `LONGEST` letters.
    """
    weights = _weights(path)
    if weights is None:
        if path.is_dir():  # as in `carry`
            (path / BESIDE).write_text(text + "\n", encoding="utf-8")
        return
    stamped = weights.with_name(f".{weights.name}.stamped")
    if _is_gguf(weights):
        gguf = read_gguf(weights)
        metadata: dict[str, GGUFValue] = {**gguf.typed(), KEY: text}
        write_gguf(stamped, metadata, gguf.tensors)
    else:
        file = read_safetensors(weights)
        write_safetensors(stamped, file.tensors, {**file.metadata, KEY: text})
    stamped.replace(weights)


def carry(path: Path, told: Callable[[Contents], str]) -> None:
    """Have a file or directory carry what is told of its contents, which are read once.

    A draft makes the room, so that what is hashed is the file as it stays.

    Args:
        path: what nobody else uses yet.
        told: the text, ASCII; as long whatever the hashes are.

    Raises:
        ProofError: if the file is another one with it.
    """
    if _weights(path) is None and not path.is_dir():
        return  # a file of another format has no place for it
    held = contents(path, hashed=False)
    draft = told(held)
    stamp(path, draft)
    found = contents(path)
    text = told(found)
    fill(path, draft, text)
    same = (held.tensors.keys(), held.settings) == (found.tensors.keys(), found.settings)
    if not same or (stamped(path) or "").rstrip() != text:
        raise ProofError("was changed by writing its proof into it", path=path)


def fill(path: Path, held: str, text: str) -> None:
    """Write a text over another of at least its length that a file or directory carries.

    Args:
        path: what nobody else uses yet.
        held: what it carries, ASCII; a blank or a draft.
        text: at most as long as that where it stands, ASCII; what is left of it is blank.

    Raises:
        FormatError: if the file does not carry that, or has no room for the text.
    """
    weights = _weights(path)
    if weights is None:
        stamp(path, text)
        return
    gguf = _is_gguf(weights)
    before, after = _entry(held, gguf=gguf), _entry(text.ljust(len(held)), gguf=gguf)
    with weights.open("r+b") as file, mmap.mmap(file.fileno(), 0) as whole:
        start = whole.find(before)
        if len(before) != len(after) or start < 0:
            raise FormatError(f"has no room for {len(text)} letters in {KEY}", path=weights)
        whole[start : start + len(after)] = after


def _entry(text: str, *, gguf: bool) -> bytes:
    """Return the stamp as a header has it, key and all."""
    if gguf:
        return KEY.encode() + struct.pack("<IQ", _STRING, len(text)) + text.encode()
    return f"{json.dumps(KEY)}:{json.dumps(text)}".encode()


def stamped(path: Path) -> str | None:
    """Return the text that a file or directory carries; None if there is none.

    Raises:
        FormatError: if the file cannot be read, or the text is no text or too long.
    """
    weights = _weights(path)
    if weights is None:
        beside = (path if path.is_dir() else path.parent) / BESIDE
        return read_document(beside, LONGEST).decode(errors="replace") if beside.exists() else None
    found = read_gguf(weights).metadata if _is_gguf(weights) else read_safetensors(weights).metadata
    text: Any = found.get(KEY)
    if text is not None and (not isinstance(text, str) or len(text) > LONGEST):
        raise FormatError(f"{KEY} is no text of up to {LONGEST} letters", path=weights)
    return text


def contents(path: Path, *, hashed: bool = True) -> Contents:
    """Return the hashes of everything that a file or directory holds, its stamp aside.

    Args:
        path: file or directory.
        hashed: whether the tensors are read; if not, every hash of one is of zeros.

    Raises:
        FormatError: if a file cannot be read.
    """
    of_tensor = _of_tensor if hashed else _unread
    tensors: dict[str, str] = {}
    settings: dict[str, str] = {}
    files: list[Path] = []
    shards: dict[str, set[str]] = {}
    weights = _weights(path)
    if weights is not None:
        tensors, settings = _of_weights(weights, of_tensor)
        shards[weights.name] = set(tensors)
    if path.is_dir():
        with readable(path):
            files = [p for p in sorted(path.rglob("*")) if p.is_file() and p != weights]
        for file in files:
            if file.name == BESIDE or file.suffix in _NOTES:
                continue
            name = file.relative_to(path).as_posix()
            more = _of_shard(file, name, of_tensor) if file.suffix == _SAFETENSORS else None
            if more is not None:
                shards[name] = set(more[0])
            if more is None or more[0].keys() & tensors.keys():
                settings |= _of_file(file, name)
            else:
                tensors |= more[0]
                settings |= more[1]
        settings |= _misplaced(path, files, shards)
    return Contents(tensors, settings)


def _misplaced(
    folder: Path, files: Iterable[Path], shards: Mapping[str, set[str]]
) -> dict[str, str]:
    """Return what no writer of ours leaves: the tensors that lie in another file than indexed."""
    found: dict[str, str] = {}
    for file in files:
        if file.name.endswith(_INDEX):
            inner = file.parent.relative_to(folder).as_posix()
            place = "" if inner == "." else f"{inner}/"
            try:
                listed: Any = read_json_object(file).get("weight_map")
            except AdapterKitError:
                continue
            for name, shard in _entries(listed):
                if place + name not in shards.get(f"{place}{shard}", ()):
                    found[f"{place}{file.name} says where {name} lies"] = _short(
                        str(shard).encode()
                    )
    return found


def _entries(listed: Any) -> Iterable[tuple[str, Any]]:
    return cast("dict[str, Any]", listed).items() if isinstance(listed, dict) else ()


def _of_weights(
    weights: Path, of_tensor: Callable[[LazyTensor], str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return a hash of each tensor, and of each key of the header but the stamp."""
    found, metadata = _opened(weights)
    hashes = in_threads(of_tensor, found.values())
    settings = {key: value for key, value in metadata if key != KEY}
    return dict(zip(found, hashes, strict=True)), settings


def _of_shard(
    file: Path, name: str, of_tensor: Callable[[LazyTensor], str]
) -> tuple[dict[str, str], dict[str, str]] | None:
    """Return the same of a file of a directory, by its place there; None if it cannot be read."""
    try:
        tensors, settings = _of_weights(file, of_tensor)
    except AdapterKitError:
        return None
    folder = name.rpartition("/")[0]
    return (
        {f"{folder}/{key}" if folder else key: value for key, value in tensors.items()},
        {f"{name}: {key}": value for key, value in settings.items()},
    )


def _opened(weights: Path) -> tuple[Mapping[str, LazyTensor], Iterator[tuple[str, str]]]:
    if _is_gguf(weights):
        gguf = read_gguf(weights)
        values = ((key, _of_value(value)) for key, value in gguf.typed().items())
        return gguf.tensors, chain(values, _unusual(gguf))
    file = read_safetensors(weights)
    return file.tensors, ((key, _short(text.encode())) for key, text in file.metadata.items())


def _unusual(file: GGUFFile) -> Iterator[tuple[str, str]]:
    """Yield what no writer of ours leaves: an old version, or bytes where nothing is stored."""
    if file.version != _GGUF_VERSION:
        yield "version of GGUF", str(file.version)
    between, at = hashlib.sha256(), file.header_end
    ends = [t.read for t in file.tensors.values() if isinstance(t.read, FileSlice)]
    with readable(file.path), file.path.open("rb") as opened:
        for start, length in [*((each.offset, each.length) for each in ends), (None, 0)]:
            opened.seek(at)
            gap = opened.read(min(_BLOCK, _BLOCK if start is None else start - at))
            if any(gap):
                between.update(gap)
            at = (start or 0) + length
    if between.digest() != hashlib.sha256().digest():
        yield "padding", between.hexdigest()[:16]
    if file.trailing:
        yield "bytes after the last tensor", str(file.trailing)


def _of_value(value: GGUFValue) -> str:
    if not isinstance(value, GGUFArray):
        return _short(repr(value).encode(errors="replace"))
    whole = hashlib.sha256(f"{value.kind} {value.length} ".encode())
    # A vocabulary has megabytes.
    pieces = value.read.chunks(_BLOCK) if isinstance(value.read, FileSlice) else (value.read(),)
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()[:16]


def _of_tensor(tensor: LazyTensor) -> str:
    whole = hashlib.sha256(f"{tensor.dtype.value} {list(tensor.shape)} ".encode())
    for block in tensor.blocks(_BLOCK):
        whole.update(block.tobytes())
    return whole.hexdigest()[:16]


def _unread(_tensor: LazyTensor) -> str:
    return "0" * 16


def _of_file(file: Path, name: str) -> dict[str, str]:
    """Return a hash for each key of a JSON object, or one for any other file."""
    if file.suffix == ".json":
        try:
            fields = read_json_object(file)
        except AdapterKitError:
            fields = {}
        if fields:
            return {
                f"{name}: {key}": _short(json.dumps(value, sort_keys=True).encode())
                for key, value in fields.items()
            }
    return {name: sha256(file)[:16]}


def sha256(file: Path) -> str:
    """Return the sha256 of a file, in hexadecimal.

    Raises:
        FormatError: if it cannot be read.
    """
    with readable(file), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _is_gguf(file: Path) -> bool:
    with readable(file), file.open("rb") as opened:
        return opened.read(len(_GGUF)) == _GGUF


def _weights(path: Path) -> Path | None:
    """Return the file whose header can carry a text; None if there is none."""
    if not path.is_dir():
        return path if _is_gguf(path) or path.suffix == _SAFETENSORS else None
    with readable(path):
        return next((path / name for name in _MAIN if (path / name).is_file()), None)
