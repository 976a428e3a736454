"""mlx-lm's loader on a transformers model, written from its rules; mlx itself needs a Mac.

The rules are those of `load_adapters` and `linear_to_lora_layers` in mlx_lm/tuner/utils.py and of
the layers' `fuse` in mlx_lm/tuner/lora.py and dora.py: which modules become adapted, which tensors
they must find, and what a, b, m and the scale do to a weight.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class RefusedError(Exception):
    """mlx-lm would raise, listing these tensors."""


@dataclass(frozen=True)
class Loaded:
    """What loading made of a model, which is changed in place.

    Attributes:
        adapted: modules that were turned into adapted layers.
        idle: those of them for which the file holds nothing; they change nothing.
    """

    adapted: tuple[str, ...]
    idle: tuple[str, ...]


def load(model: Any, folder: Path, *, stacks: Mapping[str, torch.Tensor] | None = None) -> Loaded:
    """Apply an adapter directory to the weights of a transformers model.

    Args:
        model: changed in place; its modules must be called as mlx-lm calls them.
        folder: adapter_config.json and adapters.safetensors.
        stacks: weights (E, out, in) of SwitchLinear modules by MLX path, views into the model.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapters.safetensors")
    dora = config.get("fine_tune_type", "lora") == "dora"
    weights = _adapted(model, config["num_layers"], config["lora_parameters"]["keys"], stacks or {})
    rank, scale = config["lora_parameters"]["rank"], config["lora_parameters"]["scale"]
    allowed: dict[str, tuple[int, ...]] = {}
    for name, (weight, kind) in weights.items():
        allowed |= {f"{name}.{leaf}": s for leaf, s in _shapes(weight, kind, rank, dora).items()}
    bad = [n for n, x in tensors.items() if tuple(x.shape) != allowed.get(n)]
    if bad:
        raise RefusedError(", ".join(bad))
    for name, (weight, kind) in weights.items():
        parts = {leaf: tensors.get(f"{name}.{leaf}") for leaf in ("lora_a", "lora_b", "m")}
        _fuse(weight, kind, scale, parts)
    idle = tuple(name for name in weights if f"{name}.lora_b" not in tensors)
    return Loaded(tuple(weights), idle)


def _adapted(
    model: Any, count: int, keys: list[str], stacks: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, str]]:
    found: dict[str, tuple[torch.Tensor, str]] = {}

    def wrap(prefix: str, modules: Mapping[str, tuple[torch.Tensor, str]]) -> None:
        for name, module in modules.items():
            if name.startswith(prefix) and name.removeprefix(prefix) in keys:
                if name in found:
                    raise RefusedError(f"{name} would be wrapped twice")
                found[name] = module

    known = {
        name: (module.weight, _kind(module))
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    known |= {name: (weight, "stack") for name, weight in stacks.items()}
    blocks = range(len(model.model.layers))
    for number in blocks[-max(count, 0) :]:
        wrap(f"model.layers.{number}.", known)
    wrap("", known)
    return found


def _kind(module: Any) -> str:
    if isinstance(module, torch.nn.Embedding):
        return "table"
    assert isinstance(module, torch.nn.Linear), type(module)
    return "linear"


def _shapes(weight: torch.Tensor, kind: str, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
    if kind == "stack":
        experts, outputs, inputs = weight.shape
        return {"lora_a": (experts, rank, inputs), "lora_b": (experts, outputs, rank)}
    first, second = weight.shape if kind == "table" else weight.shape[::-1]
    shapes: dict[str, tuple[int, ...]] = {"lora_a": (first, rank), "lora_b": (rank, second)}
    return shapes | ({"m": (weight.shape[0],)} if dora else {})


def _fuse(
    weight: torch.Tensor, kind: str, scale: float, parts: Mapping[str, torch.Tensor | None]
) -> None:
    a, b, m = parts["lora_a"], parts["lora_b"], parts["m"]
    if a is None or b is None:
        return
    a, b = a.double(), b.double()
    product = {"stack": lambda: b @ a, "table": lambda: a @ b, "linear": lambda: (a @ b).T}[kind]()
    with torch.no_grad():
        changed = weight.double() + scale * product
        if m is not None:
            changed = (m.double() / changed.norm(dim=1))[:, None] * changed
        weight.copy_(changed)
