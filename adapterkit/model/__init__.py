"""The neutral model that every format is read into and written from."""

from adapterkit.model.adapter import AdapterTensorSet
from adapterkit.model.update import Kind, Update

__all__ = ["AdapterTensorSet", "Kind", "Update"]
