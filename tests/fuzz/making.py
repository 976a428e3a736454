"""Sound inputs that no fixture holds: proofs, weights without a config, diffusion models."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import adapterkit
from adapterkit.containers.safetensors import read_safetensors, write_safetensors
from adapterkit.stamps import stamped
from adapterkit.tensor import LazyTensor
from fuzz.samples import FIXTURES, Sample

TINY, BASE = FIXTURES / "peft" / "tiny", FIXTURES / "peft" / "base"
_WEIGHTS = "adapter_model.safetensors"
# Of the fixture: 2 KV groups with 2 query heads each, 3 wide.
_MEGATRON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 10,
    "intermediate_size": 7,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "vocab_size": 32,
}
# module -> (out, in), those of the fixture's adapters.
_UNET = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (8, 16),
    "mid_block.attentions.0.transformer_blocks.1.ff.net.2": (8, 32),
}
_ENCODER = {"text_model.encoder.layers.0.self_attn.q_proj": (8, 8)}
_FLUX = {
    "double_blocks.0.img_attn.qkv": (24, 8),
    "single_blocks.0.linear1": (56, 8),
    "single_blocks.0.modulation.lin": (24, 8),
}


def made(make: Callable[[Path], object], given: str = "") -> Sample:
    """Return what a function writes into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        return Sample.of(Path(folder), given)


def proven(name: str) -> Sample:
    """An adapter that adapterkit wrote, and its proof, which stands in the file's own header."""

    def make(folder: Path) -> None:
        adapterkit.convert(TINY, folder / name, to=name.rsplit(".", maxsplit=1)[-1], base=BASE)
        (folder / "proof.json").write_text(stamped(folder / name) or "")

    return made(make)


def weights(*names: str) -> Sample:
    """PEFT's weights without a config: a file, or shards with an index."""

    def make(folder: Path) -> None:
        if len(names) == 1:
            shutil.copy(TINY / _WEIGHTS, folder / names[0])
            return
        tensors = read_safetensors(TINY / _WEIGHTS).tensors
        places = {name: names[place % len(names)] for place, name in enumerate(tensors)}
        for each in names:
            held = {name: tensor for name, tensor in tensors.items() if places[name] == each}
            write_safetensors(folder / each, held, {"format": "pt"})
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{_WEIGHTS}.index.json").write_text(json.dumps(index))

    return made(make)


def megatron(folder: Path) -> None:
    shutil.copy(FIXTURES / "handwritten" / "megatron.pt", folder / "adapter.pt")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(_MEGATRON))


def pipeline(folder: Path) -> None:
    """A model as diffusers saves it, its denoiser in two shards, and an adapter of it."""
    shutil.copy(FIXTURES / "diffusion" / "diffusers.safetensors", folder / "adapter.safetensors")
    base = folder / "base"
    classes = {"unet": "UNet2DConditionModel", "text_encoder_2": "CLIPTextModel"}
    for component in classes:
        (base / component).mkdir(parents=True)
    index: dict[str, Any] = {name: ["diffusers", kind] for name, kind in classes.items()}
    (base / "model_index.json").write_text(json.dumps({"_class_name": "Tiny", **index}))
    places: dict[str, str] = {}
    for place, (module, shape) in enumerate(_UNET.items(), 1):
        shard = f"diffusion_pytorch_model-0000{place}-of-00002.safetensors"
        places[f"{module}.weight"] = shard
        _saved(base / "unet" / shard, {module: shape})
    index = {"metadata": {"total_size": 1536}, "weight_map": places}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (base / "unet" / name).write_text(json.dumps(index))
    (base / "unet" / "config.json").write_text(json.dumps({"_class_name": classes["unet"]}))
    _saved(base / "text_encoder_2" / "model.safetensors", _ENCODER)


def checkpoint(folder: Path) -> None:
    """All of a diffusion model in one file, and an adapter of it."""
    shutil.copy(FIXTURES / "diffusion" / "kohya.safetensors", folder / "adapter.safetensors")
    _saved(folder / "base.safetensors", _FLUX)


def _saved(path: Path, modules: dict[str, tuple[int, int]]) -> None:
    shapes = {f"{module}.weight": shape for module, shape in modules.items()}
    tensors = {name: LazyTensor.of(np.ones(s, np.float32)) for name, s in shapes.items()}
    write_safetensors(path, tensors, {"format": "pt"})
