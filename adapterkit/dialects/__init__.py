"""Key grammars of LoRA checkpoints that people write by hand, as data."""

from adapterkit.dialects.document import Document, open_document
from adapterkit.dialects.grammar import Dialect
from adapterkit.dialects.loading import builtin, load
from adapterkit.dialects.matching import Explanation, Mismatch, Site, explain

__all__ = [
    "Dialect",
    "Document",
    "Explanation",
    "Mismatch",
    "Site",
    "builtin",
    "explain",
    "load",
    "open_document",
]
