"""Which paths hold an MLX adapter, where no config says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import AdapterKitError
from adapterkit.formats.mlx.reader import LEAF, locate, stored_tensors
from adapterkit.formats.mlx.spelling import in_block

if TYPE_CHECKING:
    from pathlib import Path


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
