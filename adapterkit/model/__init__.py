"""The neutral model that every format is read into and written from."""

from adapterkit.model.adapter import AdapterTensorSet
from adapterkit.model.beside import BesideFile, BesideKind
from adapterkit.model.sources import (
    DiffusionSource,
    GgufSource,
    MlxSource,
    OnnxSource,
    PeftSource,
    Source,
    Spelling,
)
from adapterkit.model.tying import spelled_out
from adapterkit.model.update import Kind, Update

__all__ = [
    "AdapterTensorSet",
    "BesideFile",
    "BesideKind",
    "DiffusionSource",
    "GgufSource",
    "Kind",
    "MlxSource",
    "OnnxSource",
    "PeftSource",
    "Source",
    "Spelling",
    "Update",
    "spelled_out",
]
