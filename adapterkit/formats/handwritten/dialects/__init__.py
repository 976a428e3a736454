"""Key grammars of LoRA checkpoints that people write by hand, as data."""

from adapterkit.formats.handwritten.dialects.document import Document, open_document
from adapterkit.formats.handwritten.dialects.grammar import Dialect
from adapterkit.formats.handwritten.dialects.loading import builtin, load
from adapterkit.formats.handwritten.dialects.matching import Explanation, Mismatch, Site, explain

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
