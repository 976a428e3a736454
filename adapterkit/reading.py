"""Read an adapter with the base model that it needs, given or found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.base import find_base
from adapterkit.errors import UnknownArchitectureError
from adapterkit.storage import readable

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import Options
    from adapterkit.model import AdapterTensorSet
    from adapterkit.registry import FormatSpec


def load(path: Path, spec: FormatSpec, options: Options) -> tuple[AdapterTensorSet, Options]:
    """Read an adapter, with the base that it names if none was given and that one is cached."""
    with readable(path):
        return _load(path, spec, options)


def _load(path: Path, spec: FormatSpec, options: Options) -> tuple[AdapterTensorSet, Options]:
    adapter = spec.format.read(path, options)
    if options.base is None and (found := _recorded_base(adapter)) is not None:
        options = replace(options, base=found)
        adapter = spec.format.read(path, options)
    if options.base:
        options = replace(options, base=options.base.suited(adapter.modules))
    return adapter, options


def _recorded_base(adapter: AdapterTensorSet) -> BaseModel | None:
    try:
        return find_base(adapter.base.name)
    except UnknownArchitectureError:
        return None  # what needs the base will say so; many targets do not
