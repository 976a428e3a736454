"""What training scripts keep of their own in the file of a model; the names are data."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path


def is_state(name: str, size: int = 1) -> bool:
    """Tell whether a name elsewhere than in the model is that of a training script's own state.

    Args:
        name: a key, or keys joined by dots.
        size: number of elements; single numbers have names of their own.
    """
    table = _table()
    number = size == 1 and name in table["numbers"]
    return number or any(re.fullmatch(pattern, name) for pattern in table["elsewhere"])


@cache
def _table() -> dict[str, list[str]]:
    text = Path(__file__).with_name("training.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
