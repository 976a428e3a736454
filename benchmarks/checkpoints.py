"""A Llama-shaped checkpoint and an adapter for it, made with a fixed seed, one tensor at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from zlib import crc32

import ml_dtypes
import numpy as np

from adapterkit.containers.safetensors import write_safetensors
from adapterkit.dtype import DType
from adapterkit.tensor import LazyTensor, encode

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the default has 1.04 billion parameters, 2.08 GB in bfloat16."""

    layers: int = 16
    hidden: int = 2048
    ffn: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000
    only: tuple[str, ...] = ()

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """Linear layers of a block that the adapter is for; all of them by default."""
        return {name: self.linear[name] for name in self.only or self.linear}

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Linear layers of a block, (out, in)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every stored tensor."""
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        for layer in range(self.layers):
            stem = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{stem}.{norm}.weight"] = (self.hidden,)
            found |= {f"{stem}.{name}.weight": shape for name, shape in self.linear.items()}
        return found | {"model.norm.weight": (self.hidden,)}

    @property
    def config(self) -> dict[str, object]:
        """The config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        }


def checkpoint(folder: Path, shape: Shape | None = None, *, shards: int = 4, seed: int = 0) -> None:
    """Write a sharded bfloat16 checkpoint with normal weights, if it is not there.

    Args:
        folder: directory to create.
        shape: sizes; about a billion parameters by default.
        shards: number of files.
        seed: of the weights.
    """
    shape = shape or Shape()
    if (folder / INDEX).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = list(shape.tensors)
    place = {name: 1 + index * shards // len(names) for index, name in enumerate(names)}
    files = {name: f"model-{at:05}-of-{shards:05}.safetensors" for name, at in place.items()}
    for file in dict.fromkeys(files.values()):
        held = {
            name: _tensor(name, shape.tensors[name], 0.02, seed)
            for name in names
            if files[name] == file
        }
        write_safetensors(folder / file, held, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2))
    size = sum(2 * int(np.prod(each)) for each in shape.tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def adapter(
    folder: Path, shape: Shape | None = None, *, rank: int = 16, ratio: float = 0.03, seed: int = 1
) -> None:
    """Write a bfloat16 PEFT adapter of every linear layer, if it is not there.

    Args:
        folder: directory to create.
        shape: of the checkpoint that it is for.
        rank: of every module; alpha is the same.
        ratio: ‖ΔW‖ / ‖W‖ of every module.
        seed: of the factors.
    """
    shape = shape or Shape()
    if (folder / "adapter_config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    deviation = (ratio * 0.02 / rank**0.5) ** 0.5
    held: dict[str, LazyTensor] = {}
    for layer in range(shape.layers):
        for target, (rows, columns) in shape.adapted.items():
            stem = f"base_model.model.model.layers.{layer}.{target}"
            for name, size in (
                (f"{stem}.lora_A.weight", (rank, columns)),
                (f"{stem}.lora_B.weight", (rows, rank)),
            ):
                held[name] = _tensor(name, size, deviation, seed)
    write_safetensors(folder / "adapter_model.safetensors", held, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in shape.adapted),
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _tensor(name: str, shape: tuple[int, ...], deviation: float, seed: int) -> LazyTensor:
    return LazyTensor(DType.BF16, shape, partial(_drawn, name, shape, deviation, seed))


def _drawn(name: str, shape: tuple[int, ...], deviation: float, seed: int) -> memoryview:
    """Draw a tensor anew at each reading; norms are ones."""
    if len(shape) == 1:
        return encode(np.ones(shape, ml_dtypes.bfloat16), DType.BF16)
    random = np.random.default_rng([seed, crc32(name.encode())])
    values = random.standard_normal(shape, np.float32)
    values *= np.float32(deviation)
    return encode(values, DType.BF16)
