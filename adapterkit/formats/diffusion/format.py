"""The formats of diffusion LoRAs: one reader, three spellings to write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from adapterkit.containers.safetensors import read_safetensors
from adapterkit.errors import AdapterKitError
from adapterkit.formats.diffusion.keys import DENOISER, parse
from adapterkit.formats.diffusion.losses import losses
from adapterkit.formats.diffusion.reader import read_diffusion
from adapterkit.formats.diffusion.telling import Spelled, most, told
from adapterkit.formats.diffusion.writer import write_diffusion

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.formats.diffusion.keys import Key
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss


@dataclass(frozen=True, slots=True)
class DiffusionFormat:
    """A spelling of one safetensors file.

    Attributes:
        spelling: `kohya`, `diffusers` or `comfyui`.
    """

    spelling: str

    def read(self, path: Path, options: FormatOptions) -> AdapterTensorSet:
        """Read a file of any spelling; nothing that could be told of it is asked for."""
        del options
        return read_diffusion(path, self.spelling)

    def losses(self, adapter: AdapterTensorSet, options: FormatOptions) -> list[Loss]:
        """List what the file would lack."""
        return losses(adapter, options, self.spelling)

    def write(self, adapter: AdapterTensorSet, path: Path, options: FormatOptions) -> None:
        """Write a file."""
        write_diffusion(adapter, path, options, self.spelling)


KOHYA = DiffusionFormat("kohya")
DIFFUSERS = DiffusionFormat("diffusers")
COMFYUI = DiffusionFormat("comfyui")


def is_kohya(path: Path) -> bool:
    """Tell whether a file is a LoRA with kohya's names."""
    return _spelling(path) == "kohya"


def is_diffusers(path: Path) -> bool:
    """Tell whether a file is a LoRA with diffusers' names."""
    return _spelling(path) == "diffusers"


def is_comfyui(path: Path) -> bool:
    """Tell whether a file is a LoRA with the names of the original checkpoint."""
    return _spelling(path) == "comfyui"


def _spelling(path: Path) -> str:
    """Return the spelling of most names; empty for a file that is none of a diffusion model."""
    if not path.is_file():
        return ""
    stat = path.stat()
    return _spelling_of(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _spelling_of(path: Path, *version: int) -> str:
    """Return the same of one state of a file: every spelling asks."""
    del version
    try:
        names = list(read_safetensors(path).tensors)
    except AdapterKitError:
        return ""
    keys = [key for key in map(parse, names) if key.known or key.foreign]
    if not keys or not (_certain(keys) or _explained(keys)):
        return ""
    counts = {name: sum(key.spelling == name for key in keys) for name in _SPELLINGS}
    best = max(counts, key=lambda name: counts[name])
    if counts[best]:
        return best
    first = Spelled(DENOISER, keys[0].path)
    original = all(model.names.diffusers(first.path) is None for model in told([first], {}))
    return "comfyui" if original else "diffusers"


_SPELLINGS = ("kohya", "diffusers", "comfyui")
_OWN = (
    "lora_unet_",
    "lora_prior_",
    "oft_unet_",
    "lora_te",
    "diffusion_model.",
    "text_encoders.",
    "unet.",
)


def _certain(keys: list[Key]) -> bool:
    """Tell whether prefixes alone say so, of pairs that no other kind of file holds."""
    return any(
        key.name.startswith(_OWN) and (key.part in {"down", "up"} or key.foreign) for key in keys
    )


def _explained(keys: list[Key]) -> bool:
    """Tell whether a model has the modules: half of them, or all where names have no prefix."""
    modules = [
        Spelled(key.component or DENOISER, key.path, key.underscored)
        for key in {key.stem: key for key in keys}.values()
    ]
    if all(key.component for key in keys):
        return 2 * most(modules) >= len(modules)
    # Language models have feed-forwards of this name too.
    return bool(told(modules, {})) and any("feed_forward" not in key.path for key in keys)
