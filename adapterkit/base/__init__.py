"""What is known of a base model without loading it."""

from adapterkit.base.model import BaseModel
from adapterkit.base.opening import find_base, open_base

__all__ = ["BaseModel", "find_base", "open_base"]
