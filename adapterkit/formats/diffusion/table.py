"""Diffusion models as data: one TOML file each, with the names of their modules by every program.

A row says that a module of the original checkpoint is one of diffusers', or several on top of each
other (`parts`, whose rows are to each other as `shares`). A `group` joins every place with every
module in it. Where `halves` are swapped, (shift, scale) of the original is (scale, shift) there;
`order` says the same of more chunks: which of the original's stands where, before parts are cut.
With a `ratio` of rows to columns, only what has that is moved.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.formats.diffusion.patterns import Index, filled, underscored

if TYPE_CHECKING:
    from collections.abc import Iterator

# Names whose places are kept: more than any file has, and no memory to speak of.
_REMEMBERED = 1 << 14
_FOLDER = Path(__file__).parent / "models"


@dataclass(frozen=True, slots=True)
class Row:
    """A module of the original checkpoint and what diffusers makes of it; names are patterns.

    Attributes:
        original: its name there.
        parts: its name, or names from the top row down, in diffusers.
        shares: how many rows of all each part has.
        order: which chunks of the original's rows follow each other in diffusers; empty for all
            as they are.
        order_ratio: rows to columns where alone that holds, 0 for anywhere.
        kohya: its name in trainers that do not have the original one, or empty.
        kernel: size of the kernel of a convolution, to which a flattened factor is folded again.
        written: false for a further spelling, which is only read.
    """

    original: str
    parts: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    order: tuple[int, ...] = ()
    order_ratio: int = 0
    kohya: str = ""
    kernel: int = 0
    written: bool = True

    def ordered(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the order of the chunks of an update of this size; empty for as they are."""
        return self.order if self.order_ratio in {0, rows / columns} else ()


@dataclass(frozen=True, slots=True)
class Site:
    """Where a name leads.

    Attributes:
        row: of the table.
        numbers: those of its pattern.
        part: which of the row's parts it is; None if it is the original module, all of them.
        renamed: whether it was found by a name that trainers do not write.
    """

    row: Row
    numbers: Mapping[str, str]
    part: int | None
    renamed: bool = False

    @property
    def original(self) -> str:
        """Name in the original checkpoint."""
        return filled(self.row.original, self.numbers)

    @property
    def published(self) -> str:
        """Name in the checkpoint as it was published, and in trainers of that."""
        return filled(self.row.kohya or self.row.original, self.numbers)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names in diffusers, those of every part."""
        return tuple(filled(part, self.numbers) for part in self.row.parts)


class Names:
    """The modules of a network under all of their names."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows
        self._sites: dict[tuple[str, bool, bool], Site | None] = {}
        self._indexes: dict[tuple[bool, bool], Index[tuple[Row, int | None, bool]]] = {}

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
        asked = (path, flat, parts)
        if asked not in self._sites:
            if len(self._sites) > _REMEMBERED:
                self._sites.clear()
            self._sites[asked] = self._sought(path, flat, parts=parts)
        return self._sites[asked]

    def _sought(self, path: str, flat: bool, *, parts: bool) -> Site | None:
        index = self._indexes.get((flat, parts))
        if index is None:
            index = self._indexes[flat, parts] = Index(self._patterns(flat, parts=parts))
        found = index.find(path)
        if found is None:
            return None
        (row, part, renamed), numbers = found
        return Site(row, numbers, part, renamed)

    def _patterns(
        self,
        flat: bool,
        *,
        parts: bool,
    ) -> Iterator[tuple[str, tuple[Row, int | None, bool]]]:
        for row in sorted(self.rows, key=lambda row: not row.written):
            for part, name in enumerate(row.parts) if parts else _originals(row, flat=flat):
                renamed = not parts and bool(row.kohya) and name != row.kohya
                yield underscored(name) if flat else name, (row, part, renamed)


def _originals(row: Row, *, flat: bool) -> list[tuple[None, str]]:
    """Return the names of an original module; underscores are written by trainers alone."""
    names = [row.kohya or row.original] if flat else [row.original, row.kohya]
    return [(None, name) for name in names if name]


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
        blocks: beginning of diffusers names -> how many there are, in each of its sizes.
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
    blocks: Mapping[str, list[int]] = field(default_factory=dict[str, list[int]])
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
def untabled() -> dict[str, re.Pattern[str]]:
    """Return models without a table: what people call them, and what tells a module of theirs."""
    rows = _document(_FOLDER.with_name("untabled.toml"))["model"]
    return {row["title"]: re.compile("|".join(row["names"])) for row in rows}


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
        _row(place, name, _below(target, value), written=not group.get("alias"))
        for group in fields["group"]
        for place, target in group["places"].items()
        for name, value in group["modules"].items()
    )


def _row(place: str, name: str, fields: Mapping[str, Any], *, written: bool) -> Row:
    parts = tuple(fields["parts"])
    return Row(
        _under(place, name),
        parts,
        shares=tuple(fields.get("shares", [1] * len(parts))),
        order=(1, 0) if fields.get("halves") == "swapped" else tuple(fields.get("order", ())),
        order_ratio=fields.get("ratio", 0),
        kohya=_under(place, fields["kohya"]) if "kohya" in fields else "",
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
