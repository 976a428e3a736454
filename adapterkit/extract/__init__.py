"""The adapter between two checkpoints of one model, with its error measured."""

from adapterkit.extract.extraction import extract
from adapterkit.extract.report import ExtractedModule, ExtractReport, LeftOver

__all__ = ["ExtractReport", "ExtractedModule", "LeftOver", "extract"]
