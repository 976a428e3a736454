"""Where the files of a PEFT adapter lie: one weights file, or shards of it, beside a config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterkit.beside import lying_beside
from adapterkit.containers.safetensors import PREFIX, read_safetensors
from adapterkit.errors import FormatError, NotFoundError
from adapterkit.json_file import read_json_object
from adapterkit.notes import Note
from adapterkit.storage import alike, readable
from adapterkit.strangers import of_training
from adapterkit.tables import Table, mapped, text
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.model import BesideFile

CONFIG = "adapter_config.json"
# What PEFT saves, then what Accelerate gathers of a sharded model.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_model_fsdp.bin")
# As transformers 5 saves an adapter above its largest shard; the index has the name of a model's.
_SHARD = re.compile(r"^(?P<stem>adapter_model|model)-\d{5}-of-(?P<count>\d{5})\.safetensors$")
_OWN_SHARD = re.compile(rf"(?=adapter_){_SHARD.pattern}")
_INDEXES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")
_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt"})
_LONGEST_NAME = 1000
_LISTED = mapped(text(_LONGEST_NAME, empty=False))
_SHOWN = 4
_MODULES = "modules.json"
# What downloads are called until they are whole.
_UNFINISHED = {".incomplete", ".crdownload", ".part", ".aria2", ".download"}
_ZIP = b"PK"


def locate(path: Path) -> tuple[Path, Path]:
    """Return the config and the weights file that a path means; of shards, the first.

    A directory that holds no adapter itself but one in a sub-directory means that one, as PEFT
    saves adapters that are not called `default`.

    Raises:
        NotFoundError: if there is no adapter, or several sub-directories hold one.
    """
    if path.is_dir():
        return _locate_in(path)
    if not path.is_file():
        raise NotFoundError(f"no such file or directory{alike(path)}", path=path)
    folder = path.parent
    if path.name == CONFIG or path.name in _INDEXES:
        return folder / CONFIG, _weights(folder)
    if not (folder / CONFIG).is_file():
        raise NotFoundError(
            f"has no {CONFIG} beside it; rank and alpha are not in the weights", path=path
        )
    return folder / CONFIG, path


def _locate_in(folder: Path) -> tuple[Path, Path]:
    if (folder / CONFIG).is_file():
        return folder / CONFIG, _weights(folder)
    inner = [child for child in sorted(folder.iterdir()) if (child / CONFIG).is_file()]
    if len(inner) == 1:
        return inner[0] / CONFIG, _weights(inner[0])
    if inner:
        names = ", ".join(child.name for child in inner)
        raise NotFoundError(f"holds several adapters ({names}); name one of them", path=folder)
    raise NotFoundError(f"no adapter here: no {CONFIG}", path=folder)


def _weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
        if (folder / name).is_symlink():
            raise NotFoundError(f"is not there{alike(folder / name)}", path=folder / name)
    if shards := sorted(each for each in folder.iterdir() if _OWN_SHARD.match(each.name)):
        return shards[0]
    raise NotFoundError(f"has {CONFIG} but {_missing(folder)}", path=folder)


def _missing(folder: Path) -> str:
    """Say which file of a directory is to be passed, where none has a name that PEFT gives."""
    for index in (folder / name for name in _INDEXES if (folder / name).is_file()):
        listed = Table(read_json_object(index), index).get("weight_map", _LISTED, dict[str, str]())
        if listed:
            return f"not {next(iter(listed.values()))}, which {index.name} names; download it too"
    found = sorted(
        child.name for child in folder.iterdir() if child.suffix in _SUFFIXES and child.is_file()
    )
    weights = [name for name in found if not of_training(folder / name)]
    if not weights:
        started = (child.name for child in folder.iterdir() if child.suffix in _UNFINISHED)
        cut = next((f"; {name} is a download that did not end" for name in started), "")
        return f"neither {' nor '.join(WEIGHTS[:2])}; download or copy that file too{cut}"
    others = f" (or one of {', '.join(weights[1:_SHOWN])})" if weights[1:] else ""
    return f"no file called {WEIGHTS[0]}; pass its weights: {folder / weights[0]}{others}"


def lying_beside_adapter(
    path: Path, config: Path, weights: Path, base: BaseModel | None
) -> tuple[BesideFile, ...]:
    """Return what lies beside an adapter, in its directory and in the one above that was passed.

    Of the one above its own files count, and all where it is sentence-transformers' directory.

    Raises:
        FormatError: if a folder or file cannot be read.
    """
    found = lying_beside(config.parent, {config.name, *parts(weights)}, base)
    if config.parent == path or not path.is_dir():
        return found
    names = {file.name for file in found}
    above = lying_beside(path, (), base, deep=(path / _MODULES).is_file())
    return (*found, *(file for file in above if file.name not in names))


def parts(weights: Path) -> set[str]:
    """Return the names, or patterns of names, of all files that hold an adapter's tensors."""
    if named := _SHARD.match(weights.name):
        return {f"{named['stem']}-*-of-*.safetensors", *_INDEXES}
    return {weights.name}


@dataclass(frozen=True, slots=True)
class Stored:
    """What a weights file holds.

    Attributes:
        tensors: by name; of a file of torch, those of the dictionary with the factors.
        metadata: free text.
        notes: what else there is.
    """

    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[Note, ...] = ()


def stored_tensors(path: Path) -> Stored:
    """Return the tensors of a weights file, with those of its other shards, and its metadata.

    Raises:
        NotFoundError: if a shard is missing.
        FormatError: if a file is malformed, or two shards hold one name.
        UnsupportedError: if a file of torch holds several adapters, or something beside one.
    """
    if named := _SHARD.match(path.name):
        return _sharded(path.parent, named["stem"], int(named["count"]))
    with readable(path), path.open("rb") as file:
        start = file.read(PREFIX + 1)
    # What begins as safetensors is that under any name.
    header = start[PREFIX:] == b"{"
    if not start.startswith(_ZIP) and (header or path.suffix not in {".bin", ".pt", ".pth"}):
        file = read_safetensors(path)
        return Stored(file.tensors, file.metadata)
    from adapterkit.containers.torch_zip import flatten, read_torch_zip
    from adapterkit.formats.peft.state import of_model

    root = read_torch_zip(path).root
    found = of_model(root, path)
    return Stored(found[0], notes=found[1]) if found else Stored(flatten(root))


def _sharded(folder: Path, stem: str, count: int) -> Stored:
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    for number in range(1, count + 1):
        shard = folder / f"{stem}-{number:05}-of-{count:05}.safetensors"
        if not shard.is_file():
            raise NotFoundError(
                f"is missing, one of {count} shards of the adapter; download or copy it too",
                path=shard,
            )
        file = read_safetensors(shard)
        if twice := sorted(tensors.keys() & file.tensors.keys()):
            raise FormatError("lies in two shards", path=shard, where=twice[0])
        tensors.update(file.tensors)
        metadata.update(file.metadata)
    _check_complete(folder, tensors)
    return Stored(tensors, metadata)


def _check_complete(folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Hold what the shards have against the index, where one lies beside them."""
    index = next((folder / name for name in _INDEXES if (folder / name).is_file()), None)
    if index is None:
        return
    table = Table(read_json_object(index), index)
    listed = table.get("weight_map", _LISTED, dict[str, str]())
    if missing := [name for name in listed if name not in tensors]:
        raise FormatError("is in the index and in no shard", path=index, where=missing[0])
