"""A TinyLoRA injected into a live model, written for the tests: checkpoints with known logits.

Independent of adapterkit: it follows the description of the ANRGUSC pack with torch alone, keeps
the frozen factors of every module, and can save what the pack saves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")


class TinyLinear(nn.Module):
    """A linear layer with a branch of three small matrices."""

    def __init__(self, linear: nn.Linear, name: str, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.linear = linear
        rank, size = settings["frozen_rank"], settings["projection_dim"]
        u, s, vh = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
        rank = min(rank, len(s))
        self.u, self.s, self.vh = u[:, :rank], s[:rank], vh[:rank]
        word = hashlib.sha256(name.encode("utf-8")).hexdigest()[:8]
        generator = torch.Generator().manual_seed(settings["seed"] + int(word, 16) % 100000)
        self.p = torch.randn(size, rank, rank, generator=generator) / rank**0.5
        self.scale = settings["alpha"] / size
        self.v = torch.zeros(size)

    def delta(self) -> torch.Tensor:
        """Return the update, float64 (out, in)."""
        mixed = (self.v.double()[:, None, None] * self.p.double()).sum(0)
        return self.scale * self.u.double() @ torch.diag(self.s.double()) @ mixed @ self.vh.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.delta().to(x.dtype).T


@dataclass
class Injected:
    """A model with its injected layers."""

    model: Any
    settings: Mapping[str, Any]
    layers: dict[str, TinyLinear] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Return the first module of each group, in registration order."""
        seen: dict[int, str] = {}
        for name in self.layers:
            seen.setdefault(self.groups[name], name)
        return list(seen.values())

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{name}.v": self.layers[name].v for name in self.keys}

    def save(self, folder: Path, **metadata: Any) -> Path:
        """Write a checkpoint directory as the pack does; metadata goes over the run's own."""
        folder.mkdir(parents=True)
        torch.save(self.state(), folder / "adapter_state.pt")
        (folder / "train_state.json").write_text('{"cursor": 10, "epoch": 0, "global_step": 5}')
        files = [
            {"path": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
            for name in ("train_state.json", "adapter_state.pt")
        ]
        run = {
            "model_name": "example/tiny",
            "seed": self.settings["seed"],
            "inject_summary": {"replaced_modules": len(self.layers)},
            **metadata,
        }
        manifest = {"files": files, "metadata": run, "run_id": "demo", "step": 5}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "COMPLETED").write_text("2026-01-01T00:00:00+00:00\n")
        return folder


def inject(
    model: Any,
    groups: Mapping[str, int],
    settings: Mapping[str, Any],
    *,
    spread: float = 0.5,
    seed: int = 5,
) -> Injected:
    """Wrap every module of `groups` and give each group its own random vector."""
    injected = Injected(model, settings)
    generator = torch.Generator().manual_seed(seed)
    size = settings["projection_dim"]
    vectors = {
        group: spread * torch.randn(size, generator=generator)
        for group in sorted({*groups.values()})
    }
    for name in linear_names(model, TARGETS):
        if name in groups:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            layer = TinyLinear(getattr(owner, child), name, settings)
            layer.v = vectors[groups[name]]
            setattr(owner, child, layer)
            injected.layers[name] = layer
            injected.groups[name] = groups[name]
    return injected


def linear_names(model: Any, targets: Sequence[str]) -> list[str]:
    """Return target modules in the order in which the model registers them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]


def chunked(names: Sequence[str], factor: int) -> dict[str, int]:
    """Tie modules in tiles: by layer, then by name."""
    order = sorted(names, key=lambda name: (int(name.split(".")[2]), name))
    return {name: place // factor for place, name in enumerate(order)}


def by_kind(names: Sequence[str], factor: int) -> dict[str, int]:
    """Tie modules of one kind, layer after layer."""
    groups: dict[str, int] = {}
    group = 0
    for kind in sorted({name.rpartition(".")[2] for name in names}):
        members = [name for name in names if name.endswith(f".{kind}")]
        members.sort(key=lambda name: (int(name.split(".")[2]), name))
        for start in range(0, len(members), factor):
            groups |= dict.fromkeys(members[start : start + factor], group)
            group += 1
    return groups
