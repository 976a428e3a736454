"""Read a LoRA of a diffusion model, in any spelling, into diffusers' names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adapterkit.containers.safetensors import read_safetensors
from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.formats.diffusion.keys import DENOISER, Key, parse
from adapterkit.formats.diffusion.lora_config import FIELD, LoraConfigs
from adapterkit.formats.diffusion.parts import made
from adapterkit.formats.diffusion.rows import Moved, moved
from adapterkit.formats.diffusion.table import models, untabled
from adapterkit.formats.diffusion.telling import Place, Spelled, nearest, placed, title, told
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet, DiffusionSource, Spelling, Update
from adapterkit.notes import BaseReference, Note, Provenance, first_and_more
from adapterkit.stamps import OURS
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.formats.diffusion.table import Model

_HALVES = {"down": Role.LORA_A, "up": Role.LORA_B}
BASE = "base_model_name_or_path"
# Hashes of the tensors, and what is said of alpha in place of the tensors: not free text.
STALE = ("sshs_", FIELD, "format", BASE, OURS)


@dataclass(frozen=True, slots=True)
class _Group:
    """The tensors of one module.

    Attributes:
        key: the name of one of them.
        ends: of all names.
        parts: by what they do.
        spelled: the module as the file names it.
    """

    key: Key
    ends: tuple[str, ...]
    parts: Mapping[str, LazyTensor]
    spelled: Spelled


@dataclass(slots=True)
class _Read:
    """What is read so far, by the modules of the neutral model."""

    updates: dict[str, Update] = field(default_factory=dict[str, "Update"])
    others: dict[TensorKey, LazyTensor] = field(default_factory=dict["TensorKey", "LazyTensor"])
    conflicts: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    unplaced: dict[str, str] = field(default_factory=dict[str, str])
    spellings: dict[str, Spelling] = field(default_factory=dict[str, "Spelling"])
    written_out: list[str] = field(default_factory=list[str])


def read_diffusion(path: Path, spelling: str) -> AdapterTensorSet:
    """Read a file; factors that a product must be written out for are computed when asked for.

    Args:
        path: the file.
        spelling: the format that it was told to be, for the record.

    Raises:
        FormatError: if the file is malformed, or names a module twice.
        UnsupportedError: if a tensor is of a kind that no low-rank update is made of.
    """
    file = read_safetensors(path)
    groups = _groups(file.tensors, path)
    spelled = [group.spelled for group in groups]
    found = told(spelled, file.metadata)
    configs = LoraConfigs(file.metadata, path)
    read = _Read()
    places = _Places([group.key.stem for group in groups], spelled, found)
    for group in groups:
        place = places.of(group)
        if isinstance(place, str):
            read.unplaced[group.key.stem] = place
        _add(read, group, place, configs, path)
    name = title(found, spelled) if found else None
    return AdapterTensorSet.of(
        read.updates.values(),
        read.others,
        base=BaseReference(file.metadata.get(BASE), architecture=name),
        rank_conflicts=read.conflicts,
        unplaced=read.unplaced,
        source=DiffusionSource(tuple(model.name for model in found), read.spellings),
        metadata={
            name: value for name, value in file.metadata.items() if not name.startswith(STALE)
        },
        provenance=Provenance(path, spelling, _notes(name, file.metadata, read)),
    )


def _groups(tensors: Mapping[str, LazyTensor], path: Path) -> list[_Group]:
    keys = [parse(name) for name in tensors]
    if strange := sorted((key for key in keys if not key.known), key=lambda key: not key.foreign):
        what = f"is of {strange[0].foreign}, " if strange[0].foreign else "is "
        raise UnsupportedError(
            f"{what}no part of a low-rank update of a weight; merge the file into its base where "
            f"it was trained ({first_and_more([key.name for key in strange])})",
            path=path,
            where=strange[0].name,
        )
    parts: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    first: dict[str, Key] = {}
    ends: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        if key.part in parts[key.stem]:
            raise FormatError("is there under a second name", path=path, where=key.name)
        parts[key.stem][key.part] = tensors[key.name]
        ends[key.stem].append(key.end)
        first.setdefault(key.stem, key)
    return [
        _Group(key, tuple(ends[stem]), parts[stem], _spelled(key, parts[stem]))
        for stem, key in first.items()
    ]


def _spelled(key: Key, parts: Mapping[str, LazyTensor]) -> Spelled:
    """Return the module as its file names it, with its size where a pair of factors says it."""
    up = parts["up"].shape[:1] if "up" in parts else ()
    down = parts["down"].shape[1:2] if "down" in parts else ()
    outputs, inputs = (*up, *down) if up and down else (0, 0)
    return Spelled(key.component or DENOISER, key.path, key.underscored, outputs, inputs)


class _Places:
    """Where the modules of a file stand: in the models that have all of them, else in the nearest.

    Attributes:
        spelled: every module of the file.
        found: models that have every one.
    """

    def __init__(self, stems: list[str], spelled: list[Spelled], found: tuple[Model, ...]) -> None:
        self.spelled, self.found = spelled, found
        self._untabled = "" if found else _untabled(stems)
        self._nearest = None if found else nearest(spelled)

    def of(self, group: _Group) -> Place | str | None:
        """Return where a module stands, None if diffusers calls it so, or why nobody knows."""
        if self._untabled and group.key.spelling != "diffusers":
            message = f"is in a file of {self._untabled}, whose names are in no table"
            return f"{message}; convert it, or merge it into its base, where it was trained"
        chosen = (self._nearest,) if self._nearest else self.found
        places = [place for model in chosen if (place := placed(model, group.spelled))]
        if len({place.meaning for place in places}) > 1:
            return f"could be of {title(chosen, self.spelled)}, where it is another module each"
        if places:
            return places[0]
        if group.key.spelling == "diffusers":
            return None
        if self._nearest:
            return f"is no module of {self._nearest.title}"
        names = ", ".join(model.title for model in models())
        return f"is no module of {names}; other models are read in diffusers' names alone"


def _untabled(stems: list[str]) -> str:
    """Return the models without a table that some modules are certainly of; empty if none is."""
    flat = [stem.replace(".", "_") for stem in stems]
    return " with ".join(
        title for title, names in untabled().items() if any(map(names.search, flat))
    )


def _add(
    read: _Read, group: _Group, place: Place | str | None, configs: LoraConfigs, path: Path
) -> None:
    if isinstance(place, str):
        names, place = (group.key.stem,), None
    else:
        names = place.modules if place else (f"{group.key.component}.{group.key.path}",)
    if half := _half(group.parts):
        role, tensor = half
        read.others[TensorKey(names[0], role)] = tensor
        return
    read.spellings |= dict.fromkeys(names, _spelling(group))
    component, _, module = names[0].partition(".")
    said = configs.of(component, module)
    try:
        kernel = place.site.row.kernel if place else 0
        built = made(group.parts, kernel, said[1] if said else None)
        pieces = pieces_of(place, Moved(built.update, built.others))
    except KeyError as error:
        raise FormatError(f"has no {error.args[0]}", path=path, where=group.key.stem) from None
    except ValueError as error:
        raise UnsupportedError(str(error), path=path, where=group.key.stem) from None
    if said and "alpha" not in group.parts and said[0] != built.update.rank:
        read.conflicts[names[0]] = (said[0], built.update.rank)
    if built.written_out:
        read.written_out.append(group.key.stem)
    for name, piece in zip(names, pieces, strict=True):
        if name in read.updates:
            raise FormatError(
                f"is {name}, which another tensor is too", path=path, where=group.key.name
            )
        read.updates[name] = replace(piece.update, module=name)
        read.others |= {TensorKey(name, role): tensor for role, tensor in piece.others.items()}


def _spelling(group: _Group) -> Spelling:
    key, alpha = group.key, group.parts.get("alpha")
    number = float(alpha.numpy().reshape(())) if alpha is not None and alpha.size == 1 else None
    component = "" if not key.prefix else key.component
    return Spelling(key.stem, key.prefix, component, key.path, key.underscored, group.ends, number)


def _half(parts: Mapping[str, LazyTensor]) -> tuple[Role, LazyTensor] | None:
    """Return the one factor of a pair whose other one is missing."""
    present = [name for name in _HALVES if name in parts]
    return (_HALVES[present[0]], parts[present[0]]) if len(present) == 1 else None


def pieces_of(place: Place | None, whole: Moved) -> list[Moved]:
    """Return the updates of a module's parts in diffusers.

    Raises:
        ValueError: if its rows cannot be shared so.
    """
    if place is None or place.site.part is not None:
        return [whole]
    row = place.site.row
    if order := row.ordered(*whole.update.matrix_shape):
        whole = moved(whole, [1] * len(order), order=order)[0]
    return moved(whole, row.shares) if len(row.shares) > 1 else [whole]


def _notes(name: str | None, metadata: Mapping[str, str], read: _Read) -> tuple[str, ...]:
    notes = [Note(f"the model is {name}")] if name else []
    if module := metadata.get("ss_network_module"):
        notes.append(Note(f"trained by kohya's scripts or in their manner ({module})"))
    if model := metadata.get("ss_sd_model_name"):
        notes.append(Note(f"trained on {model}"))
    if read.written_out:
        names = first_and_more(read.written_out)
        notes.append(Note(f"products of more than two factors are written out as two ({names})"))
    return tuple(notes)
