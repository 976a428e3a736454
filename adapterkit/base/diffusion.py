"""Diffusion models as bases: a directory of components as diffusers saves it, or a single file.

The tensors of a component have its name before theirs, as the modules of an adapter have; those of
a single file are named as they are stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.base.model import BaseModel
from adapterkit.errors import FormatError, NotFoundError
from adapterkit.json_file import read_json_object
from adapterkit.tables import Table, mapped, text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapterkit.tensor import LazyTensor

PIPELINE = "model_index.json"
# Components that an adapter can change.
COMPONENTS = (
    *("unet", "transformer", "transformer_2"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
)
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
# Names that no other model's checkpoint has, and none of a LoRA file.
_ORIGINAL = (
    *("model.diffusion_model.", "diffusion_model.", "double_blocks.", "joint_blocks."),
    *("input_blocks.", "cond_stage_model.", "conditioner.", "text_encoders."),
    *("double_layers.", "double_stream_blocks.", "noise_refiner.", "patch_embedding."),
)


def is_pipeline(folder: Path) -> bool:
    """Tell whether a directory is one that diffusers has saved: of a pipeline or of a model."""
    if (folder / PIPELINE).is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and "_diffusers_version" in read_json_object(config)


def open_pipeline(folder: Path) -> BaseModel:
    """Read the headers of all components that an adapter can change.

    Raises:
        NotFoundError: if no component has safetensors weights, or a shard is missing.
        FormatError: if a file is malformed.
    """
    from adapterkit.architectures import unlisted

    if (folder / PIPELINE).is_file():
        index = read_json_object(folder / PIPELINE)
        folders = {name: name for name in COMPONENTS if name in index and (folder / name).is_dir()}
        kind = str(index.get("_class_name") or "")
    else:
        kind = str(read_json_object(folder / "config.json").get("_class_name") or "")
        folders = {"unet" if kind.startswith("UNet") else "transformer": ""}
    tensors: dict[str, LazyTensor] = {}
    for component, inside in folders.items():
        stored = _component(folder / inside)
        tensors |= {f"{component}.{name}": tensor for name, tensor in stored.items()}
    if not tensors:
        raise NotFoundError("has no safetensors weights in its components", path=folder)
    return BaseModel(
        path=folder,
        kind="hf",
        name=None,
        candidates=(unlisted((kind,)),),
        facts={},
        tensors=tensors,
        names=frozenset(tensors),
        tied=False,
        layout="pipeline",
        folders=folders,
    )


def _component(folder: Path) -> Mapping[str, LazyTensor]:
    from adapterkit.containers.safetensors import read_safetensors

    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _sharded(folder, index)
        if (folder / name).is_file():
            return read_safetensors(folder / name).tensors
    return {}


def _sharded(folder: Path, index: Path) -> Mapping[str, LazyTensor]:
    from adapterkit.containers.safetensors import read_safetensors

    table = Table(read_json_object(index), index)
    shards = table.get("weight_map", mapped(text(255, empty=False)), dict[str, str]())
    tensors: dict[str, LazyTensor] = {}
    for shard in dict.fromkeys(shards.values()):
        if "/" in shard or "\\" in shard or not (folder / shard).is_file():
            raise NotFoundError("is missing; download the model again", path=folder / shard)
        tensors |= read_safetensors(folder / shard).tensors
    if missing := [name for name in shards if name not in tensors]:
        raise FormatError("is in no shard", path=index, where=missing[0])
    return tensors


def open_checkpoint(path: Path) -> BaseModel | None:
    """Read the header of a single file with all of a diffusion model; None if it is none."""
    from adapterkit.architectures import unlisted
    from adapterkit.containers.safetensors import read_safetensors

    tensors = read_safetensors(path).tensors
    factors = any(".lora_" in name or name.endswith(".alpha") for name in tensors)
    if factors or not any(name.startswith(_ORIGINAL) for name in tensors):
        return None
    return BaseModel(
        path=path,
        kind="hf",
        name=None,
        candidates=(unlisted(("a diffusion checkpoint",)),),
        facts={},
        tensors=tensors,
        names=frozenset(tensors),
        tied=False,
        layout="checkpoint",
    )
