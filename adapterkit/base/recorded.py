"""The base that an adapter names, where it is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.base.opening import find_base, open_base
from adapterkit.errors import FormatError
from adapterkit.notes import Note, NoteKind

if TYPE_CHECKING:
    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet


def recorded_base(
    adapter: AdapterTensorSet, *, original: bool = True
) -> tuple[BaseModel | None, tuple[Note, ...]]:
    """Return the base that an adapter names, where it is at hand, and what is to be said of that.

    It is looked for as a path, then in the local hub cache; of a quantised one that is nowhere,
    the 16-bit original is meant, if the cache has just one, unless `original` is false.
    """
    name, source = adapter.base.name, adapter.provenance
    if not name:
        return None, ()
    path = source.path if source else None
    folder = path if path is None or path.is_dir() else path.parent
    try:
        if folder is not None and (place := _model_at(folder, name)) is not None:
            note = Note(f"the base is {place}, which the adapter names")
            return open_base(place), (note,)
        if (found := find_base(name)) is not None or not original:
            return found, ()
        from adapterkit.base.originals import find_original

        if (found := find_original(name)) is None:
            return None, ()
        text = f"the adapter names {name}, which is not at hand; the base is its 16-bit original "
        return found, (Note(f"{text}in the hub cache, {found.name}", NoteKind.ORIGINAL),)
    except FormatError as error:
        return None, (Note(f"the base that it names is not used: {error}"),)


def other_architecture(adapter: AdapterTensorSet, base: BaseModel | None) -> tuple[Note, ...]:
    """Say that the base at hand is of another architecture than the one that the adapter names.

    That is known only where the named one is at hand too.
    """
    named, _ = recorded_base(adapter, original=False)
    if named is None or base is None:
        return ()
    kinds = [_architecture(model, like=base) for model in (named, base)]
    if kinds[0] == kinds[1] or not all(kinds):
        return ()
    text = f"the adapter names {adapter.base.name}, which is {kinds[0]}, and the base at hand "
    return (Note(f"{text}is {kinds[1]}", NoteKind.OTHER_BASE),)


def _architecture(model: BaseModel, *, like: BaseModel) -> str:
    """Return what two models are compared by; empty where it is not known."""
    if like.kind == model.kind == "hf":
        return str(model.facts.get("model_type") or "")
    return model.architecture.gguf if model.architecture.known else ""


def _model_at(folder: Path, name: str) -> Path | None:
    """Return the model directory of a path that an adapter names, as PEFT takes it or beside it."""
    try:
        found = [path for path in (Path(name), folder / name) if (path / "config.json").is_file()]
    except (OSError, ValueError):  # no name of a file
        return None
    return found[0] if found else None
