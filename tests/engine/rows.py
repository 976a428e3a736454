"""The model families under test, one TOML row each."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    """How to make a tiny random model of one family; common.toml explains the fields."""

    name: str
    family: str
    config_class: str
    model_class: str
    config: Mapping[str, Any]
    optional: Mapping[str, Any]
    gguf: Mapping[str, Any]
    lora: Mapping[str, Any]
    tensors: Mapping[str, Any]
    gelu: bool
    config_only: bool
    encoder: bool
    dropped: str


def family_rows(*, encoder: bool = False) -> tuple[str, ...]:
    """Return the names of all rows of decoders, or of encoders, sorted."""
    names = sorted(path.stem for path in (_HERE / "families").glob("*.toml"))
    return tuple(name for name in names if family_row(name).encoder is encoder)


@cache
def family_row(name: str) -> FamilyRow:
    """Read one row over what common.toml says."""
    row = tomllib.loads((_HERE / "families" / f"{name}.toml").read_text(encoding="utf-8"))
    common = tomllib.loads((_HERE / "common.toml").read_text(encoding="utf-8"))
    prefix = row.pop("model", "")
    made = FamilyRow(
        name=name,
        family=row.pop("family", name),
        config_class=row.pop("config_class", f"{prefix}Config"),
        model_class=row.pop("model_class", f"{prefix}ForCausalLM"),
        config=_with_nulls(row.pop("config", {}), row.pop("null", ())),
        optional=common["config"],
        gguf=common["gguf"] | row.pop("gguf", {}),
        lora=row.pop("lora", {}),
        tensors=row.pop("tensors", {}),
        gelu=row.pop("gelu", False),
        config_only=row.pop("config_only", False),
        encoder=row.pop("encoder", False),
        dropped=row.pop("dropped", "(?!)"),
    )
    if row:
        raise ValueError(f"{name}.toml: unknown fields {sorted(row)}")
    return made


def _with_nulls(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    for name in names:
        *outer, last = name.split(".")
        inner = config
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = None
    return config
