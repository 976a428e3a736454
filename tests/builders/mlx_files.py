"""MLX adapters as MLX-LM writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from adapterkit.base import open_base
from adapterkit.formats.mlx.reader import read_mlx
from adapterkit.formats.protocol import FormatOptions

if TYPE_CHECKING:
    from adapterkit.model import AdapterTensorSet


Q = "model.layers.0.self_attn.q_proj"
R, IN, OUT, E = 4, 12, 20, 3


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([*shape, seed]).normal(size=shape).astype(np.float32)


def saved(
    folder: Path,
    tensors: dict[str, np.ndarray],
    *,
    name: str = "adapters.safetensors",
    parameters: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter as mlx-lm's trainer does."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    document = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": R, "scale": 20.0, "dropout": 0.0, **(parameters or {})},
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def read(path: Path, **options: Any) -> AdapterTensorSet:
    return read_mlx(path, FormatOptions(**options))


def same(got: np.ndarray, want: np.ndarray) -> None:
    """Equal but for the order in which float64 products were summed."""
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-14 * np.linalg.norm(want)


def hf(folder: Path, config: Any) -> Any:
    """Save a bare config.json and open it as a base."""
    config.save_pretrained(folder)
    return open_base(folder / "config.json")


def linear(module: str = Q) -> dict[str, np.ndarray]:
    return {f"{module}.lora_a": drawn(IN, R), f"{module}.lora_b": drawn(R, OUT)}


def stack(block: str) -> dict[str, np.ndarray]:
    sizes = {"gate_proj": (OUT, IN), "up_proj": (OUT, IN), "down_proj": (IN, OUT)}
    tensors: dict[str, np.ndarray] = {}
    for seed, (leaf, (rows, columns)) in enumerate(sizes.items()):
        tensors[f"{block}.{leaf}.lora_a"] = drawn(E, R, columns, seed=seed)
        tensors[f"{block}.{leaf}.lora_b"] = drawn(E, rows, R, seed=seed)
    return tensors


def change(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    return 20.0 * tensors[f"{module}.lora_b"].astype(float) @ tensors[f"{module}.lora_a"]


FIXTURES = Path(__file__).parents[2] / "fixtures"
