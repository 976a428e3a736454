"""Adapters whose numbers lie at the edges of their types, and what they mean in wide arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from adapterkit.containers.safetensors import write_safetensors
from adapterkit.tensor import LazyTensor

Array = np.ndarray[Any, Any]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj")
RANK = 2
_LAYERS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


@dataclass(frozen=True, kw_only=True)
class Edge:
    """An adapter at the edge of numbers: B and A random, each entry times a size.

    Attributes:
        b: what B is multiplied with.
        a: what A is multiplied with.
        dtype: of both.
        alpha: in the config.
        rank: of the factors.
        width: of every weight of the base, 32 or 1.
    """

    b: float = 1.0
    a: float = 1.0
    dtype: type[np.floating[Any]] = np.float32
    alpha: float = 2.0 * RANK
    rank: int = RANK
    width: int = 32

    def factors(self, module: str, seed: int) -> tuple[Array, Array]:
        source = np.random.default_rng([seed, MODULES.index(module)])
        b = source.uniform(0.5, 1, (self.width, self.rank)) * source.choice([-1, 1])
        a = source.uniform(0.5, 1, (self.rank, self.width)) * source.choice([-1, 1], self.width)
        with np.errstate(under="ignore"):
            return (b * self.b).astype(self.dtype), (a * self.a).astype(self.dtype)

    @property
    def scale(self) -> np.longdouble:
        return np.longdouble(self.alpha) / max(self.rank, 1)

    def deltas(self, seed: int) -> dict[str, Array]:
        """Return what it adds to every weight, in arithmetic that none of this can overflow."""
        found: dict[str, Array] = {}
        for module in MODULES:
            b, a = (x.astype(np.longdouble) for x in self.factors(module, seed))
            found[module] = self.scale * (b @ a)
        return found

    def write(self, folder: Path, seed: int) -> Path:
        """Save the adapter as PEFT does."""
        return self._saved(folder, {m: self.factors(m, seed) for m in MODULES}, self.alpha)

    def write_twin(self, folder: Path, seed: int) -> Path:
        """Save what it would be in sizes near 1, in float64: the same but for `size`."""
        parts = {
            module: (
                (b.astype(np.longdouble) / self.b).astype(np.float64),
                (a.astype(np.longdouble) / self.a).astype(np.float64),
            )
            for module in MODULES
            for b, a in [self.factors(module, seed)]
        }
        return self._saved(folder, parts, math.copysign(2.0 * self.rank, self.alpha))

    @property
    def size(self) -> np.longdouble:
        """The twin's update times this is its own."""
        return abs(self.scale) / 2 * np.longdouble(self.b) * np.longdouble(self.a)

    def _saved(self, folder: Path, parts: Mapping[str, tuple[Array, Array]], alpha: float) -> Path:
        tensors: dict[str, LazyTensor] = {}
        for module, (b, a) in parts.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = LazyTensor.of(a)
            tensors[f"base_model.model.{module}.lora_B.weight"] = LazyTensor.of(b)
        folder.mkdir()
        write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "target_modules": ["down_proj", "o_proj"],
            "r": self.rank,
            "lora_alpha": alpha,
        }
        (folder / CONFIG).write_text(json.dumps(config))
        return folder


EDGES: dict[str, Edge] = {
    "plain": Edge(),
    "product past float64": Edge(b=1e160, a=1e160, dtype=np.float64),
    "squares past float64": Edge(b=1e150, a=1e150, dtype=np.float64),
    "lopsided float64": Edge(b=1e160, a=1e-160, dtype=np.float64),
    "largest float64": Edge(b=1e308, a=1.0, dtype=np.float64),
    "product below float64": Edge(b=1e-200, a=1e-200, dtype=np.float64),
    "denormal product": Edge(b=1e-160, a=1e-160, dtype=np.float64),
    "denormal float64": Edge(b=1e-318, a=1.0, dtype=np.float64),
    "large float32": Edge(b=1e30, a=1e30),
    "largest float32": Edge(b=3e38, a=1.0),
    "lopsided float32": Edge(b=1e38, a=1e-38),
    "denormal float32": Edge(b=1e-42, a=1.0),
    "denormals of float32": Edge(b=1e-42, a=1e-42),
    "denormal float16": Edge(b=1e-6, a=1.0, dtype=np.float16),
    "largest float16": Edge(b=6e4, a=6e4, dtype=np.float16),
    "alpha 1e308": Edge(alpha=1e308),
    "alpha past float32": Edge(b=1e-20, alpha=1e40),
    "alpha below float32": Edge(b=1e20, alpha=1e-42),
    "alpha -1e308": Edge(alpha=-1e308),
    "alpha 1e-320": Edge(alpha=1e-320),
    "alpha 1e308, tiny": Edge(b=1e-30, alpha=1e308),
    "alpha 1e308, tiny float64": Edge(b=1e-306, alpha=1e308, dtype=np.float64),
    "alpha -2": Edge(alpha=-2.0),
    "alpha 0": Edge(alpha=0.0),
    "zero B": Edge(b=0.0),
    "zero A": Edge(a=0.0),
    "zero": Edge(b=0.0, a=0.0),
    "rank 0": Edge(rank=0),
    "one by one": Edge(width=1, rank=1),
    "one by one, rank 2": Edge(width=1),
}


def write_base(
    folder: Path, width: int, dtype: Any = np.float32, add: Mapping[str, Array] | None = None
) -> Path:
    """Write a llama whose every weight has `width` rows and columns."""
    tensors: dict[str, Array] = {
        "model.embed_tokens.weight": _weight("embed", width, rows=16),
        "lm_head.weight": _weight("head", width, rows=16),
        "model.norm.weight": np.ones(width),
        "model.layers.0.input_layernorm.weight": np.ones(width),
        "model.layers.0.post_attention_layernorm.weight": np.ones(width),
    }
    for layer in _LAYERS:
        tensors[f"model.layers.0.{layer}.weight"] = _weight(layer, width)
    for module, delta in (add or {}).items():
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].astype(np.longdouble) + delta
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "vocab_size": 16,
    }
    folder.mkdir()
    with np.errstate(over="ignore", under="ignore"):
        stored = {name: LazyTensor.of(x.astype(dtype)) for name, x in tensors.items()}
    write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weight(module: str, width: int) -> Array:
    """Return the weight of a module of that base."""
    return _weight(module.removeprefix("model.layers.0."), width)


def _weight(name: str, width: int, rows: int = 0) -> Array:
    source = np.random.default_rng(list(name.encode()))
    return source.standard_normal((rows or width, width)).astype(np.float32).astype(np.float64)


_GGUF_NAMES = {
    "mlp.down_proj": "ffn_down",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
}


def write_gguf_base(path: Path, width: int) -> Path:
    """Write the same llama as GGUF; what llama.cpp permutes is random anyway."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_context_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(16)
    writer.add_tensor("token_embd.weight", _weight("embed", width, 16).astype(np.float32))
    writer.add_tensor("output.weight", _weight("head", width, 16).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    for layer in _LAYERS:
        writer.add_tensor(
            f"blk.0.{_GGUF_NAMES[layer]}.weight", _weight(layer, width).astype(np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
