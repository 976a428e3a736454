"""Read, check, convert, merge and audit LoRA adapters in every format."""

__version__ = "0.1.0"
