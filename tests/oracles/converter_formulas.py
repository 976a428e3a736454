"""Where llama.cpp's own converter puts the rows of classes that only remote code has.

Recorded by fixtures/classes/remote.py; see test_family_formulas, which uses it.
"""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Array = np.ndarray[Any, np.dtype[Any]]
    Module = tuple[int, int, Callable[[Array], dict[str, Array]]]
    Placed = list[tuple[str, int | list[int]]]

FOLDER = Path(__file__).parents[2] / "fixtures" / "classes"
ROWS = tomllib.loads((FOLDER / "remote.toml").read_text(encoding="utf-8"))
RECORDED = json.loads((FOLDER / "remote.json").read_text(encoding="utf-8"))["families"]


def formula(placed: Placed, tensors: Mapping[str, Any]) -> Callable[[Array], dict[str, Array]]:
    """Return what takes a module's weight apart, experts into stacks where the others are zero."""

    def apart(weight: Array) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for tensor, rows in placed:
            stack, bracket, place = tensor.partition("[")
            part = weight[:rows] if isinstance(rows, int) else weight[rows]
            if bracket:
                experts = sum(name.startswith(f"{stack}[") for name in tensors)
                whole = np.zeros((experts, *part.shape))
                whole[int(place.removesuffix("]"))] = part
                part = whole
            found[stack] = part
        return found

    return apart


def _case(name: str) -> tuple[str, dict[str, Any], dict[str, Module]]:
    row, tensors = ROWS[name], cast("dict[str, Any]", RECORDED[name])
    placed: dict[str, Placed] = defaultdict(list)
    for tensor, (module, rows) in tensors.items():
        placed[module].append((tensor, rows))
    modules = {
        module: (out, columns, formula(placed[module], tensors))
        for module, (out, columns) in row["modules"].items()
    }
    return row["class"], row["config"], modules


# Family -> class and config of a base; module -> its rows and columns, and the tensors it fills.
CASES = {name: _case(name) for name in ROWS}
