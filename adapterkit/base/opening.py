"""Open a base model: a Hugging Face directory, a config.json, a GGUF file, or a cached hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit import hub, strangers
from adapterkit.base.diffusion import is_pipeline, open_checkpoint, open_pipeline
from adapterkit.base.model import BaseModel
from adapterkit.errors import FormatError, NotFoundError, UnknownArchitectureError
from adapterkit.json_file import read_json_object
from adapterkit.storage import alike, readable
from adapterkit.tables import FLAG, TEXT, Table, listed, mapped, shown, text, whole

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from adapterkit.architectures import Architecture
    from adapterkit.containers.gguf import GGUFArray
    from adapterkit.tensor import LazyTensor

# Nested configuration of a text tower -> prefix that transformers puts before its modules.
_ADAPTER = "adapter_config.json"
_TEXT_TOWERS = {
    "thinker_config": "thinker.model.",
    "text_config": "model.language_model.",
    "llm_config": "model.language_model.",
    "language_config": "model.language_model.",
}
_USUAL_TOWER = ".language_model."
# The table of a text tower; of a class without a tower it is the trunk's own.
_TABLE = re.compile(r"(?:(.+)\.)??(?:embed_tokens|embeddings\.tok_embeddings)\.weight")
INDEX = "model.safetensors.index.json"
_WORD = text(1 << 8)
# The names of split models count to 99999; the largest one has some two hundred.
_LONGEST_NAME, _MOST_PARTS = 255, 9_999
_LONGEST_ARRAY = 1 << 16
_MAGIC, _CONFIG = b"GGUF", "config.json"
_NO_WEIGHTS = (
    "is a GGUF without weights, as llama.cpp keeps a vocabulary alone; pass the model's own GGUF"
)


def open_base(base: Path | str) -> BaseModel:
    """Read the headers of a base model; weights stay on disk.

    Args:
        base: a directory with config.json, a config.json, a .gguf file, or a hub id
            (`org/name`) that is in the local hub cache.

    Raises:
        NotFoundError: if there is nothing at the path and no such model in the cache.
        FormatError: if a file is malformed.
        UnknownArchitectureError: if no family file describes a GGUF file's model.
    """
    path = Path(base)
    with readable(path):
        return _opened(path, base)


def _opened(path: Path, reference: str | Path) -> BaseModel:
    if _is_adapter(path):
        what = "is an adapter, not a base model; pass the model that it was trained on"
        raise NotFoundError(what, path=path)
    if path.is_dir():
        return open_pipeline(path) if is_pipeline(path) else _open_directory(path)
    if path.is_file():
        return _open_file(path)
    if cached := find_base(str(reference)):
        return cached
    if named := hub.parse(str(reference)):
        return _open_config(hub.downloaded_base(named) / "config.json", name=named.name)
    raise NotFoundError(
        f"no base model here; {strangers.BASE}, or a hub id{alike(path)}",
        path=reference,
    )


def _open_file(path: Path) -> BaseModel:
    """Open a config, a file of weights, or a GGUF; what is none is named as what it is."""
    if path.suffix == ".safetensors":
        return _open_weights(path)
    with path.open("rb") as file:
        begin = file.read(len(_MAGIC))
    if begin == _MAGIC:
        return _open_gguf(path)
    if path.suffix == ".json" and (path.name == _CONFIG or not strangers.named(path, base=True)):
        return _open_config(path, name=None)
    what = strangers.named(path, base=True) or f"is no base model that is read; {strangers.BASE}"
    raise FormatError(what, path=path)


def _open_weights(path: Path) -> BaseModel:
    """Open the model that a file is the weights of: with what lies beside it, or all in one."""
    if (path.parent / "config.json").is_file():
        return _opened(path.parent, path.parent)
    if (model := open_checkpoint(path)) is not None:
        return model
    raise NotFoundError("has no config.json beside it; a base needs one", path=path)


def find_base(name: str | None) -> BaseModel | None:
    """Find a hub id in the local hub cache, offline; None if it is not there."""
    reference = hub.parse(name) if name else None
    for snapshot in hub.cached(reference) if reference else ():
        if (snapshot / "config.json").is_file():
            return _open_config(snapshot / "config.json", name=name)
    return None


def _is_adapter(path: Path) -> bool:
    """Tell whether a path is an adapter's directory, or a file in it, and no model lies there."""
    folder = path if path.is_dir() else path.parent
    told = path.is_dir() or path.name == _ADAPTER or path.suffix == ".safetensors"
    model = (folder / "config.json").is_file() or any(folder.glob("*.gguf"))
    return told and path.exists() and (folder / _ADAPTER).is_file() and not model


def _open_directory(path: Path) -> BaseModel:
    if (path / "config.json").is_file():
        return _open_config(path / "config.json", name=None)
    models = sorted(path.glob("*.gguf"))
    if len(models) == 1:
        return _open_gguf(models[0])
    found = f"{len(models)} .gguf files" if models else "no config.json and no .gguf file"
    raise NotFoundError(f"{found}; name the base model's file", path=path)


def _open_config(path: Path, name: str | None) -> BaseModel:
    config = read_json_object(path)
    fields = Table(config, path)
    architectures = _families(config, path)
    facts = _text_config(config)
    tensors, names = _safetensors(path.parent)
    recorded = name or fields.optional("_name_or_path", TEXT)
    classes = tuple(fields.optional("architectures", listed(_WORD)) or ())
    return BaseModel(
        path=path.parent if tensors else path,
        kind="hf",
        name=recorded or None,
        candidates=architectures,
        facts=facts,
        tensors=tensors,
        names=names,
        tied=_tied((fields, Table(facts, path)), architectures[0], names),
        text_prefix=_text_prefix(config, classes),
        classes=classes,
    )


def _text_prefix(config: Mapping[str, Any], classes: Iterable[str]) -> str:
    """Return what the paths of a wrapper's text tower begin with; empty if it is no wrapper.

    Most have `language_model`; a class that is known has its own (`text_model` of SmolVLM), or
    none, if its own trunk has a part of the configuration that is called so.
    """
    from adapterkit.base.classes import model_class

    usual = next((p for key, p in _TEXT_TOWERS.items() if _is_map(config, key)), "")
    known = next(filter(None, map(model_class, classes)), None)
    if not usual.endswith(_USUAL_TOWER) or known is None or known.headless or not known.prefix:
        return usual
    towers = {found[1] for found in map(_TABLE.fullmatch, known.kinds) if found}
    tower = towers.pop() if len(towers) == 1 else usual
    if tower and "." in tower:
        return usual
    return f"{known.prefix}.{tower}." if tower else ""


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _TEXT_TOWERS:
        if isinstance(inner := config.get(key), dict):
            return _text_config({**config, **cast("dict[str, Any]", inner), key: None})
    return config


def _families(config: Mapping[str, Any], path: Path) -> tuple[Architecture, ...]:
    """Return the families of a model's class, or that of its text tower's.

    The class decides: a model_type says what a model is only where no class is named, or one
    that transformers builds several models with.
    """
    from adapterkit.architectures import find, unlisted

    fields = Table(config, path)
    named: list[str] = []
    for source in [fields, *filter(None, (_tower(fields, key) for key in _TEXT_TOWERS))]:
        classes = source.optional("architectures", listed(_WORD)) or ()
        kind = source.optional("model_type", _WORD)
        own = not classes or (kind and _stand_in(classes, kind))
        for name in filter(None, (kind,)) if own else classes:
            if found := tuple(a for a in find(name) if name in a.names):
                return _selected(found, "hf", _text_config(config), path)
        named += [*classes, *filter(None, (kind,))]
    return (unlisted(tuple(named)),)


def _stand_in(classes: Iterable[str], kind: str) -> bool:
    """Tell whether transformers builds a model type with a class of another family."""
    from adapterkit.architectures import find

    known = (family for family in find(kind) if kind in family.model_types)
    return any(not {*classes}.isdisjoint(family.stand_ins) for family in known)


def _tower(fields: Table, key: str) -> Table | None:
    return fields.table(key) if _is_map(fields.fields, key) else None


def _is_map(config: Mapping[str, Any], key: str) -> bool:
    return isinstance(config.get(key), dict)


def _selected(
    found: tuple[Architecture, ...], side: str, facts: Mapping[str, Any], path: Path
) -> tuple[Architecture, ...]:
    """Put families whose `select` holds first, and leave out those whose does not.

    Those of which the facts do not tell come last.
    """
    from adapterkit.architectures import Sizes

    held = {a: a.select and Sizes(a, side, facts, path).fact(a.select) for a in found}
    special = tuple(a for a in found if a.select and held[a])
    plain = tuple(a for a in found if not a.select)
    return (*special, *plain, *(a for a in found if held[a] is None and a.select)) or found


def _tied(
    sources: Iterable[Table], architecture: Architecture, names: Collection[str]
) -> bool | None:
    for source in sources:
        if (value := source.optional("tie_word_embeddings", FLAG)) is not None:
            return value
    if names:
        return not any(name.endswith("lm_head.weight") for name in names)
    return architecture.tied


def _safetensors(folder: Path) -> tuple[dict[str, LazyTensor], frozenset[str]]:
    """Read the headers of every shard that is there, and the names that the index lists."""
    from adapterkit.containers.safetensors import read_safetensors

    names: set[str] = set()
    files = [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        weights = weight_map(folder)
        names.update(weights)
        files = list(dict.fromkeys(weights.values()))
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        if file.is_file():
            tensors.update(read_safetensors(file).tensors)
    return tensors, frozenset(names | tensors.keys())


def weight_map(folder: Path) -> dict[str, Path]:
    """Return the shard of every tensor, as the index of a checkpoint has it.

    Raises:
        FormatError: if the index maps no names to names of files, or to more than any model has.
    """
    table = Table(read_json_object(folder / INDEX), folder / INDEX)
    # Only plain file names: an index must not lead out of its directory.
    shards = table.get("weight_map", mapped(text(_LONGEST_NAME, empty=False)), dict[str, str]())
    files = set(shards.values())
    if len(files) > _MOST_PARTS:
        raise table.error("weight_map", f"names {len(files)} files, the most is {_MOST_PARTS}")
    paths = {shard: folder / Path(shard).name for shard in files}
    return {name: paths[shard] for name, shard in shards.items()}


def _open_gguf(path: Path) -> BaseModel:
    from adapterkit.architectures import find
    from adapterkit.containers.gguf import read_gguf

    file = read_gguf(path)
    fields = Table(file.metadata, path)
    kind = fields.get("general.type", TEXT, "model")
    if kind != "model":
        what = f"is a GGUF of type {shown(kind)}, not a base model; {strangers.BASE}"
        raise FormatError(what, path=path)
    name = fields.get("general.architecture", _WORD)
    found = tuple(a for a in find(name) if a.gguf == name)
    if not found:
        raise UnknownArchitectureError(
            f"architecture {name!r} is not in the tables; `adapterkit list families` lists what is",
            path=path,
        )
    tensors = {**file.tensors, **_other_shards(path, file.metadata, name)}
    if not tensors:
        raise FormatError(_NO_WEIGHTS, path=path)
    facts = _gguf_facts(name, file.metadata, tensors, path)
    identity = {
        key.removeprefix("general."): value
        for key, value in file.metadata.items()
        if key in _IDENTITY and isinstance(value, str)
    }
    return BaseModel(
        path=path,
        kind="gguf",
        name=identity.get("name"),
        candidates=_selected(found, "gguf", facts, path),
        facts=facts,
        tensors=tensors,
        identity=identity,
        tied="output.weight" not in tensors,
    )


def _other_shards(path: Path, metadata: Mapping[str, Any], name: str) -> dict[str, LazyTensor]:
    """Read the tensor tables of the other files of a split model, `name-00002-of-00003.gguf`.

    Raises:
        NotFoundError: if a part is missing.
        FormatError: if a part is of another model or place, or two hold one tensor; llama.cpp
            refuses them too.
    """
    from adapterkit.containers.gguf import read_gguf

    count = Table(metadata, path).get("split.count", whole(0, _MOST_PARTS), 0)
    if count <= 1:  # one file is no split
        return {}
    named = _SPLIT.match(path.name)
    if named is None:
        raise FormatError(
            f"is one of {count} parts, but is not named NAME-00001-of-{count:05}.gguf", path=path
        )
    tensors: dict[str, LazyTensor] = {}
    for number in range(1, count + 1):
        shard = path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf")
        if not shard.is_file():
            raise NotFoundError("is missing from the split base model", path=shard)
        part = read_gguf(shard)
        _check_part(Table(part.metadata, shard), name, number, count)
        if twice := next((tensor for tensor in part.tensors if tensor in tensors), None):
            raise FormatError("is in two parts of the split base model", path=shard, where=twice)
        tensors.update(part.tensors)
    total = Table(metadata, path).get("split.tensors.count", whole(0, 1 << 31), len(tensors))
    if total != len(tensors):
        raise FormatError(f"has {len(tensors)} tensors in its parts, not {total}", path=path)
    return tensors


def _check_part(part: Table, name: str, number: int, count: int) -> None:
    if (other := part.get("general.architecture", _WORD, name)) != name:
        message = f"is a part of architecture {shown(other)}, the first is {name}"
        raise FormatError(message, path=part.path)
    found = (
        part.get("split.no", whole(0, _MOST_PARTS)) + 1,
        part.get("split.count", whole(0, _MOST_PARTS)),
    )
    if found != (number, count):
        message = f"says that it is part {found[0]} of {found[1]}, not {number} of {count}"
        raise FormatError(message, path=part.path)


_SPLIT = re.compile(r"^(.+)-\d{5}-of-\d{5}\.gguf$")
_IDENTITY = (
    "general.name",
    "general.basename",
    "general.organization",
    "general.version",
    "general.repo_url",
)


def _numbers(value: GGUFArray, path: Path, key: str) -> list[Any]:
    """Return a list of sizes, such as one for each layer."""
    if value.length > _LONGEST_ARRAY:
        message = f"has {value.length} elements, the most is {_LONGEST_ARRAY}"
        raise FormatError(message, path=path, where=key)
    return list(value.values())


def _gguf_facts(
    name: str, metadata: Mapping[str, Any], tensors: Mapping[str, LazyTensor], path: Path
) -> dict[str, Any]:
    from adapterkit.containers.gguf import GGUFArray

    facts: dict[str, Any] = {}
    for key, value in metadata.items():
        if key.startswith(f"{name}."):
            short = key.removeprefix(f"{name}.").replace(".", "__")
            facts[short] = _numbers(value, path, key) if isinstance(value, GGUFArray) else value
    if (embedding := tensors.get("token_embd.weight")) and embedding.shape:
        # The stored table is what factors must fit, whatever the header says of the vocabulary.
        facts["vocab_size"] = embedding.shape[0]
    return facts
