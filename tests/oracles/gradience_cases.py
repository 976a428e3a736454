"""Adapters for gradience and the audit to measure side by side, and what gradience is asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from audit_adapters import adapter, gaussian, layered, orthonormal, planted, written
from example_adapter import example
from terminal import PEFT

from adapterkit.model import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

HOSTILE = PEFT.parent / "hostile" / "peft"
BROKEN = ("nowhere", "empty", "nan", "a-without-b")


def saved(folder: Path, pairs: dict[str, Any], **config: Any) -> Path:
    """Write an adapter whose config says what is given, and nothing of scales."""
    path = written(adapter(pairs), folder)
    known = json.loads((path / "adapter_config.json").read_text())
    for name in ("use_rslora", "alpha_pattern", "rank_pattern"):
        known.pop(name, None)
    (path / "adapter_config.json").write_text(json.dumps(known | config))
    return path


EXPERTS = "model.layers.0.mlp.experts.down_proj"


def experts() -> list[Any]:
    return [gaussian(20, 24, 3, seed=seed, dtype=np.float64) for seed in range(4)]


def padded() -> Any:
    """Return factors of rank 16 with an update of rank 2."""
    a, b = planted([3.0, 2.0], 40, 30)
    return np.concatenate([a, np.zeros((14, 30))]), np.concatenate([b, np.zeros((40, 14))], axis=1)


def sharing_outputs() -> tuple[Any, Any]:
    """Return two updates with the same B and independent A."""
    random = np.random.default_rng(0)
    b = orthonormal(random, 200, 8)
    return (random.standard_normal((8, 200)), b), (random.standard_normal((8, 200)), b)


PATTERNED = ["layers.1.self_attn.q_proj", "layers.11.self_attn.q_proj", "layers.2.mlp.q_proj_x"]
TINY = (1e-8, 1e-9, 1e-20)
SMALL = gaussian(40, 30, 6, dtype=np.float64)
FALLING = np.array([1.0, 1e-4, 1e-10, 1e-12])
GPT2 = {f"transformer.h.{layer}.attn.c_attn": gaussian(9, 9, 2, seed=layer) for layer in range(6)}
WIDE = {
    "h.0.c_attn": gaussian(3000, 100, 8, dtype=np.float64),
    "h.1.c_proj": gaussian(1000, 100, 8, dtype=np.float64, seed=1),
}
SHAPES = {
    "model.layers.0.self_attn.q_proj": gaussian(64, 48, 8, seed=1),
    "model.layers.0.mlp.up_proj": gaussian(300, 40, 8, seed=2),
    "model.layers.1.mlp.down_proj": gaussian(40, 300, 8, seed=3),
    "model.layers.1.self_attn.k_proj": gaussian(8, 48, 8, seed=4),
}


def sources(folder: Path) -> dict[str, Path]:
    """Write the adapters that plain files can say."""
    halves = {name: (a.astype(np.float16), b.astype(np.float16)) for name, (a, b) in SHAPES.items()}
    whole = {
        "example": adapter(example_pairs(), scale=2.0),
        "tall-and-wide": adapter(SHAPES, scale=2.0),
        "one-direction": adapter({"model.layers.0.x": gaussian(30, 20, 1)}, scale=0.5),
        "half": adapter(halves, scale=0.25),
        "falling": adapter(layered(3, rank=6), scale=1.5),
        "gpt2": adapter(GPT2 | {"transformer.h.0.mlp.c_proj": gaussian(9, 9, 2)}),
        "small": adapter({f"layers.{i}.x": (SMALL[0], SMALL[1] * f) for i, f in enumerate(TINY)}),
        "experts": adapter({EXPERTS: stacked()}, kinds={EXPERTS: Kind.EXPERTS}),
        "zero": adapter({name: (a, b * 0) for name, (a, b) in layered(2).items()}),
        "flat": adapter({"layers.0.x": planted([1.0] * 256, 300, 280)}),
        "flat-8": adapter({"layers.0.x": planted([1.0] * 8, 40, 40)}),
        "lost": adapter({"layers.0.x": planted(FALLING, 60, 50)}),
        "wide": adapter(WIDE),
        "many": adapter(
            {f"layers.{layer}.x": gaussian(6, 5, 2, seed=layer) for layer in range(50)}
        ),
    }
    found = {name: written(each, folder / name) for name, each in whole.items()}
    for name, pair in zip(("one", "other"), sharing_outputs(), strict=True):
        found[name] = written(adapter({"layers.0.x": pair}), folder / name)
    rslora = {"lora_alpha": 16, "use_rslora": True}
    found["rslora"] = saved(folder / "rs", {"layers.0.x": gaussian(80, 90, 64)}, r=64, **rslora)
    found["padded"] = saved(folder / "padded", {"layers.0.x": padded()}, r=16, **rslora)
    patterns = {"1.self_attn.q_proj": 64, r"^model\.layers\.2\..*": 12}
    pairs = {f"model.{name}": gaussian(8, 8, 4) for name in PATTERNED}
    found["patterns"] = saved(
        folder / "patterns", pairs, r=4, lora_alpha=16, alpha_pattern=patterns
    )
    (folder / "empty").mkdir()
    broken = {name: HOSTILE / name for name in BROKEN[2:]}
    more = {"empty": folder / "empty", "nowhere": folder / "nowhere", "dora": PEFT / "dora"}
    return found | broken | more | {"pirate": PEFT.parent / "pirate" / "adapter"}


def example_pairs() -> dict[str, Any]:
    return {pair.module: (pair.a.numpy(), pair.b.numpy()) for pair in example().pairs()}


def stacked() -> Any:
    return np.stack([a for a, _ in experts()]), np.stack([b for _, b in experts()])


def commands_for(found: Mapping[str, Path]) -> dict[str, list[object]]:
    """Return what to ask about the adapters, by a name."""
    folder = found["empty"].parent
    norms = {"sigma_max": 2.0, "fro_norm": 5.0}
    for name, names in (("gpt2", GPT2), ("falling", layered(3, rank=6))):
        (folder / f"{name}.json").write_text(json.dumps(dict.fromkeys(names, norms)))
    full = ["--json", "--layers", "--suggest-per-layer", "--top-singular-values", "16"]
    commands: dict[str, list[object]] = {
        name: ["audit", "--peft-dir", path, *full] for name, path in found.items()
    }
    for name in BROKEN[:2]:
        commands[name] = ["audit", "--peft-dir", found[name]]
    commands["many"] = ["audit", "--peft-dir", found["many"], "--json"]
    for name in ("gpt2", "falling"):
        commands[name] += ["--base-norms-cache", folder / f"{name}.json"]
    commands["flat-8"] += ["--rank-policies", "energy@0.95,knee,oht"]
    commands["pair"] = ["merge-audit", "--adapter-a", found["one"], "--adapter-b", found["other"]]
    commands["pair"] += ["--json"]
    commands["cut"] = ["truncate", "--peft-dir", found["padded"], "--out-dir", folder / "cut"]
    commands["cut"] += ["--rank", "2", "--dtype", "fp32"]
    return commands
