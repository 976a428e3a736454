"""GGUF LoRA adapters, as llama.cpp and everything built on it load them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.formats.gguf.losses import losses
from adapterkit.formats.gguf.reader import read_adapter
from adapterkit.formats.gguf.writer import write_adapter
from adapterkit.model import spelled_out

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.formats.protocol import Options
    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss


class GGUFFormat:
    """Reads and writes single `.gguf` files."""

    def read(self, path: Path, options: Options) -> AdapterTensorSet:
        """Read an adapter; without a base, rows whose order needs head counts stay as they are."""
        return read_adapter(path, options)

    def losses(self, adapter: AdapterTensorSet, options: Options) -> list[Loss]:
        """List what llama.cpp cannot hold of this adapter, on this base."""
        return losses(spelled_out(adapter), options)

    def write(self, adapter: AdapterTensorSet, path: Path, options: Options) -> None:
        """Write a file."""
        write_adapter(spelled_out(adapter), path, options)


FORMAT = GGUFFormat()
