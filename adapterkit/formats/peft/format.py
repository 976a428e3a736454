"""PEFT LoRA adapters: `adapter_config.json` with `adapter_model.safetensors` or `.bin`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.formats.peft.reader import read_peft
from adapterkit.formats.peft.writer import losses, write_peft

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.formats.protocol import Options
    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss


class PeftFormat:
    """Reads directories, sub-directories and weight files; writes directories."""

    def read(self, path: Path, options: Options) -> AdapterTensorSet:
        """Read an adapter; the base is needed for some old layouts of experts only."""
        return read_peft(path, options.base)

    def losses(self, adapter: AdapterTensorSet, options: Options) -> list[Loss]:
        """List what PEFT cannot hold."""
        del options
        return losses(adapter)

    def write(self, adapter: AdapterTensorSet, path: Path, options: Options) -> None:
        """Write an adapter directory."""
        write_peft(adapter, path, base=options.base, dtype=options.dtype)


FORMAT = PeftFormat()
