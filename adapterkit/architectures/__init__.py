"""Model families as data: names, row orders and sizes of Hugging Face and llama.cpp."""

from adapterkit.architectures.sizes import Sizes
from adapterkit.architectures.table import (
    LLAMA_CPP,
    Architecture,
    Match,
    Target,
    WeightRule,
    families,
    find,
    load,
    refusal,
    unlisted,
)

__all__ = [
    "LLAMA_CPP",
    "Architecture",
    "Match",
    "Sizes",
    "Target",
    "WeightRule",
    "families",
    "find",
    "load",
    "refusal",
    "unlisted",
]
