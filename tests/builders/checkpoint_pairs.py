"""Two small Llama checkpoints whose difference is given, without torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.containers.safetensors import write_safetensors
from adapterkit.dtype import DType
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Array = np.ndarray[Any, Any]
Q = "model.layers.0.self_attn.q_proj"


def config(hidden: int, heads: int = 4) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32,
        "tie_word_embeddings": False,
    }


def checkpoint(folder: Path, weights: Mapping[str, Array], dtype: DType, **fields: Any) -> Path:
    """Write parameters, whatever model they are a part of."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config(32), **fields}))
    stored = {name: LazyTensor.of(values, dtype) for name, values in weights.items()}
    write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})
    return folder


def pair(
    folder: Path, update: Array, *, dtype: DType = DType.F32, seed: int = 0, size: float = 0.02
) -> tuple[Path, Path]:
    """Write a base with one random matrix, and the same with an update added and rounded once."""
    folder.mkdir(exist_ok=True)
    weight = size * np.random.default_rng(seed).standard_normal(update.shape)
    weight = np.asarray(LazyTensor.of(weight, dtype).numpy(), dtype=np.float64)
    base = checkpoint(folder / "base", {f"{Q}.weight": weight}, dtype)
    return base, checkpoint(folder / "tuned", {f"{Q}.weight": weight + update}, dtype)


def spectrum(rows: int, columns: int, values: Array, seed: int = 1) -> Array:
    """Return a matrix with these singular values."""
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.standard_normal((rows, values.size)))[0]
    right = np.linalg.qr(random.standard_normal((columns, values.size)))[0]
    return (left * values) @ right.T
