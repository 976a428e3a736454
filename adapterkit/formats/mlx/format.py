"""MLX-LM adapters: `adapters.safetensors` with the arguments of their training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import AdapterKitError
from adapterkit.formats.mlx.losses import losses
from adapterkit.formats.mlx.reader import LEAF, locate, read_mlx, stored_tensors
from adapterkit.formats.mlx.spelling import in_block
from adapterkit.formats.mlx.writer import write_mlx
from adapterkit.model import spelled_out

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.formats.protocol import Options
    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss


class MLXFormat:
    """Reads directories and checkpoint files; writes directories."""

    def read(self, path: Path, options: Options) -> AdapterTensorSet:
        """Read an adapter; embeddings need the base."""
        return read_mlx(path, options)

    def losses(self, adapter: AdapterTensorSet, options: Options) -> list[Loss]:
        """List what MLX-LM cannot hold."""
        return losses(spelled_out(adapter), options)

    def write(self, adapter: AdapterTensorSet, path: Path, options: Options) -> None:
        """Write an adapter directory."""
        write_mlx(spelled_out(adapter), path, options)


def is_mlx(path: Path) -> bool:
    """Tell whether a path without mlx-lm's config holds tensors as mlx-lm names them.

    All of them must end as an adapter's do, and some lie in numbered blocks; `.lora_a.weight` is no
    sign, other programs write it too.
    """
    try:
        names = list(stored_tensors(locate(path)[1])[0])
    except AdapterKitError:
        return False
    found = [LEAF.match(name) for name in names]
    ours = all(match and not match["leaf"].endswith("weight") for match in found)
    return ours and any(match and in_block(match["module"]) for match in found)


FORMAT = MLXFormat()
