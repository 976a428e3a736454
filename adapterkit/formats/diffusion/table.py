"""Diffusion models as data: one TOML file each, with the names of their modules by every program.

A row says that a module of the original checkpoint is one of diffusers', or several on top of each
other (`parts`, whose rows are to each other as `shares`). A `group` joins every place with every
module in it. Where `halves` are swapped, (shift, scale) of the original is (scale, shift) there.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.formats.diffusion.patterns import Index, filled, underscored

if TYPE_CHECKING:
    from collections.abc import Iterator

_FOLDER = Path(__file__).parent / "models"


@dataclass(frozen=True, slots=True)
class Row:
    """A module of the original checkpoint and what diffusers makes of it; names are patterns.

    Attributes:
        original: its name there.
        parts: its name, or names from the top row down, in diffusers.
        shares: how many rows of all each part has.
        swapped: whether the halves of the rows are exchanged.
        kernel: size of the kernel of a convolution, to which a flattened factor is folded again.
        written: false for a further spelling, which is only read.
    """

    original: str
    parts: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    swapped: bool = False
    kernel: int = 0
    written: bool = True


@dataclass(frozen=True, slots=True)
class Site:
    """Where a name leads.

    Attributes:
        row: of the table.
        numbers: those of its pattern.
        part: which of the row's parts it is; None if it is the original module, all of them.
    """

    row: Row
    numbers: Mapping[str, str]
    part: int | None

    @property
    def original(self) -> str:
        """Name in the original checkpoint."""
        return filled(self.row.original, self.numbers)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names in diffusers, those of every part."""
        return tuple(filled(part, self.numbers) for part in self.row.parts)


class Names:
    """The modules of a network under all of their names."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows
        self._indexes: dict[tuple[bool, bool], Index[tuple[Row, int | None]]] = {}

    def find(self, path: str, *, flat: bool) -> Site | None:
        """Return where an original or diffusers name leads, None if nowhere.

        Args:
            path: the module.
            flat: whether its dots are underscores.
        """
        return self.original(path, flat=flat) or self.diffusers(path, flat=flat)

    def original(self, path: str, *, flat: bool = False) -> Site | None:
        """Return where a name of the original checkpoint leads."""
        return self._found(path, flat, parts=False)

    def diffusers(self, path: str, *, flat: bool = False) -> Site | None:
        """Return where a name of diffusers leads."""
        return self._found(path, flat, parts=True)

    def _found(self, path: str, flat: bool, *, parts: bool) -> Site | None:
        index = self._indexes.get((flat, parts))
        if index is None:
            index = self._indexes[flat, parts] = Index(self._patterns(flat, parts=parts))
        found = index.find(path)
        if found is None:
            return None
        (row, part), numbers = found
        return Site(row, numbers, part)

    def _patterns(
        self,
        flat: bool,
        *,
        parts: bool,
    ) -> Iterator[tuple[str, tuple[Row, int | None]]]:
        for row in sorted(self.rows, key=lambda row: not row.written):
            names = enumerate(row.parts) if parts else [(None, row.original)]
            for part, name in names:
                yield underscored(name) if flat else name, (row, part)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A text encoder of a model.

    Attributes:
        component: its name in diffusers.
        network: name of its table.
        kohya: what follows `lora_` there; the first is written.
        comfyui: its name there.
    """

    component: str
    network: str
    kohya: tuple[str, ...]
    comfyui: str

    @property
    def names(self) -> Names:
        """Its modules."""
        return network(self.network)


@dataclass(frozen=True, slots=True)
class Variant:
    """A model that has the table of another; the first whose condition holds is it.

    Attributes:
        title: as people call it.
        has: beginning of a diffusers name that only it has, or empty.
        inputs: end of the name of a module and how wide its input is, or empty.
    """

    title: str
    has: str = ""
    inputs: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, kw_only=True)
class Model:
    """A diffusion model.

    Attributes:
        name: of its file.
        title: as people call it.
        component: name of the denoiser in diffusers, `unet` or `transformer`.
        kohya: whether kohya's trainers know the modules by their `original` or `diffusers` names.
        names: the modules of the denoiser.
        encoders: its text encoders.
        variants: what else it may be.
        ratios: original name -> rows to columns, where that tells it from models with the name.
        blocks: beginning of diffusers names -> how many there are, where that tells it apart.
        declared: what trainers call it in a file's metadata, beginnings in lower case.
    """

    name: str
    title: str
    component: str
    kohya: str
    names: Names
    encoders: tuple[Encoder, ...] = ()
    variants: tuple[Variant, ...] = ()
    ratios: Mapping[str, list[int]] = field(default_factory=dict[str, list[int]])
    blocks: Mapping[str, int] = field(default_factory=dict[str, int])
    declared: tuple[str, ...] = ()

    @cached_property
    def ratio_index(self) -> Index[list[int]]:
        """The ratios by name."""
        return Index(self.ratios.items())

    def encoder(self, component: str, path: str, *, flat: bool) -> Encoder | None:
        """Return the text encoder that a prefix means, by any spelling, and that has the module."""
        for each in self.encoders:
            named = component in {each.component, each.comfyui, *each.kohya}
            if named and each.names.find(path, flat=flat):
                return each
        return None


@cache
def models() -> tuple[Model, ...]:
    """Return every model that has a table, in the order of their names."""
    return tuple(_model(path) for path in sorted(_FOLDER.glob("*.toml")))


@cache
def network(name: str) -> Names:
    """Return the modules of a text encoder."""
    return Names(_rows(_document(_FOLDER / "encoders" / f"{name}.toml")))


def _document(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _model(path: Path) -> Model:
    fields = _document(path)
    names = Names(_rows(fields))
    fields.pop("group")
    encoders = [
        Encoder(row["component"], row["network"], tuple(row["kohya"]), row["comfyui"])
        for row in fields.pop("encoder", [])
    ]
    return Model(
        name=path.stem,
        names=names,
        encoders=tuple(encoders),
        variants=tuple(Variant(**row) for row in fields.pop("variant", [])),
        declared=tuple(fields.pop("declared", [])),
        **fields,
    )


def _rows(fields: Mapping[str, Any]) -> tuple[Row, ...]:
    return tuple(
        _row(_under(place, name), _below(target, value), written=not group.get("alias"))
        for group in fields["group"]
        for place, target in group["places"].items()
        for name, value in group["modules"].items()
    )


def _row(original: str, fields: Mapping[str, Any], *, written: bool) -> Row:
    parts = tuple(fields["parts"])
    return Row(
        original,
        parts,
        shares=tuple(fields.get("shares", [1] * len(parts))),
        swapped=fields.get("halves") == "swapped",
        kernel=fields.get("kernel", 0),
        written=written,
    )


def _below(place: str, value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row, the names of its parts put under a place."""
    fields: dict[str, Any] = {"to": value} if isinstance(value, str) else dict(value)
    parts = fields.pop("parts", None) or [fields.pop("to")]
    return {**fields, "parts": [_under(place, part) for part in parts]}


def _under(place: str, name: str) -> str:
    return ".".join(part for part in (place, name) if part)
