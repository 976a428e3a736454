"""How a checkpoint says that it is quantised, and which of the ways can be decoded."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.dtype import DType
from adapterkit.json_file import read_json_object
from adapterkit.tables import Table, listed, printable, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.base.model import BaseModel

_TABLE = Path(__file__).with_name("quantised.toml")
# Where quantisers say it: fields of config.json, and the file that some write beside it instead.
FIELDS = ("quantization_config", "compression_config")
BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_PAIR = 2
_BLOCK = listed(whole(-1, 1 << 30, integral=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way of storing weights that can be decoded; quantised.toml explains the fields.

    Attributes:
        config: the checkpoint's own quantization_config.
        path: the checkpoint, for messages.
    """

    name: str
    when: Mapping[str, Sequence[Any]]
    values: str
    scales: tuple[str, ...]
    types: tuple[DType, ...]
    packed: bool = False
    coded: bool = False
    blocks: tuple[str, ...] = ()
    default: tuple[int, int] | None = None
    matrices: bool = False
    left_out: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    path: Path | None = None

    def declared_blocks(self) -> tuple[tuple[int, int], ...]:
        """Return every (rows, columns) that the configuration names, or the default where none.

        Raises:
            FormatError: if the sizes of a block are no whole numbers.
        """
        fields = Table(self.config, self.path)
        found: dict[tuple[int, int], None] = {}
        for name in self.blocks:
            for value in _looked_up(self.config, name.split(".")):
                if isinstance(value, (list, tuple)):
                    pair = fields.checked(name, cast("object", value), _BLOCK)
                    if len(pair) == _PAIR and min(pair) > 0:
                        found[pair[0], pair[1]] = None
        if self.default and self.blocks[0] not in self.config:
            found[self.default] = None
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Refused:
    """A quantisation that is not decoded.

    Attributes:
        name: what it is, as messages call it.
    """

    name: str


def quantisation(base: BaseModel) -> Scheme | Refused | None:
    """Return how a Hugging Face base is quantised, or None if nothing says that it is."""
    config = _config(base)
    if config is None:
        return None
    document = _document()
    for row in document["scheme"]:
        if _holds(row["when"], config):
            return replace(_scheme(row, config), path=base.path)
    row = next(row for row in document["refused"] if _holds(row["when"], config))
    name = row.get("name") or printable(config.get("quant_method", "unknown"))
    details = [_detail(key, config[key]) for key in row.get("shown", ()) if config.get(key)]
    return Refused(", ".join([name, *details]))


def quantisation_method(base: BaseModel) -> str | None:
    """Return `quant_method` of a base; None if nothing says that it is quantised."""
    config = _config(base)
    return None if config is None else str(config.get("quant_method", "unknown")).lower()


@cache
def decodable() -> str:
    """Return the names of the schemes, for messages."""
    return ", ".join(row["name"] for row in _document()["scheme"])


@cache
def _document() -> Mapping[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def _config(base: BaseModel) -> Mapping[str, Any] | None:
    for name in FIELDS:
        if found := base.facts.get(name):
            return (
                cast("Mapping[str, Any]", found)
                if isinstance(found, dict)
                else {"quant_method": found}
            )
    file = base.path / BESIDE[0]
    if base.kind == "hf" and file.is_file():
        found = read_json_object(file).get("quantization")
        if isinstance(found, dict):
            return {"quant_method": "modelopt", **cast("dict[str, Any]", found)}
    return None


def _scheme(row: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    fields: dict[str, Any] = {
        key: tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        for key, value in row.items()
    }
    fields["types"] = tuple(DType[name] for name in row["types"])
    return Scheme(**fields, config=config)


def _holds(when: Mapping[str, Sequence[Any]], config: Mapping[str, Any]) -> bool:
    """Tell whether every field has one of its values; `false` is also that of a missing field."""
    for name, allowed in when.items():
        found = list(_looked_up(config, name.split("."))) or [False]
        if not all(value in allowed for value in found):
            return False
    return True


def _looked_up(config: Any, path: list[str]) -> Iterator[Any]:
    """Yield what is at a path of keys, `*` for every key; nothing where there is nothing."""
    if not path:
        if config is not None:
            yield config
        return
    if not isinstance(config, dict):
        return
    table = cast("dict[str, Any]", config)
    for value in table.values() if path[0] == "*" else (table.get(path[0]),):
        yield from _looked_up(value, path[1:])


def _detail(key: str, value: Any) -> str:
    return f"{printable(value)} bits" if key == "bits" else printable(value)
