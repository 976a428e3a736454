"""The 16-bit original of a quantised base that an adapter names, told by its name."""

from __future__ import annotations

import re
from pathlib import PurePath

from adapterkit import hub
from adapterkit.base.model import BaseModel
from adapterkit.base.opening import find_base
from adapterkit.base.schemes import quantisation

# What quantisers put at the end of a model's name, as often as they like.
_QUANTISED = re.compile(
    r"([-_.](unsloth|bnb|gptq|awq|gguf|hqq|exl2|nf4|fp4|int[48]|fp8|[48]bits?|q[48]|w[48]a(8|16)"
    r"|quantized|gs?\d+|g?\d+g))+$",
    re.IGNORECASE,
)


def plain_name(name: str) -> str:
    """Return the last part of a model's name without punctuation, case or quantisation suffix."""
    last = _QUANTISED.sub("", PurePath(name.rstrip("/")).name).lower()
    return "".join(letter for letter in last if letter.isalnum())


def find_original(name: str) -> BaseModel | None:
    """Return the model in the local hub cache that a quantised one is named after.

    None where the name does not say that it is quantised, and where there is none, or more than
    one, of that name and not quantised itself.
    """
    if not _QUANTISED.search(PurePath(name.rstrip("/")).name):
        return None
    wanted = plain_name(name)
    same = (find_base(each) for each in hub.cached_names() if plain_name(each) == wanted)
    found = [base for base in same if base is not None and quantisation(base) is None]
    return found[0] if len(found) == 1 else None
