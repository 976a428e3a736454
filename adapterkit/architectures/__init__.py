"""Model families as data: names, row orders and sizes of Hugging Face and llama.cpp."""

from adapterkit.architectures.sizes import Sizes
from adapterkit.architectures.table import (
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
