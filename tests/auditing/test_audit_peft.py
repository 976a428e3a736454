"""PEFT as the oracle: its own ΔW has the norms that are measured, and it loads what is advised."""

from __future__ import annotations

import json
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from audit_adapters import planted
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from adapterkit import audit, compress_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "q_proj": 5},
        "alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 7, "^model.layers.1.self_attn.q_proj": 1},
        "target_modules": ["q_proj", "down_proj"],
    },
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "convolution": {"r": 4, "lora_alpha": 2, "target_modules": ["conv"]},
    "experts": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.down_proj"],
    },
    "all-linear": {"r": 2, "lora_alpha": 64, "target_modules": "all-linear"},
}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(4, 32, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eji->bj", x, self.down_proj)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(32, 32)})
        self.mlp = nn.ModuleDict({"down_proj": nn.Linear(96, 32), "experts": Experts()})


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 32)
        self.conv = nn.Conv2d(6, 10, 3)
        self.layers = nn.ModuleList(Layer() for _ in range(3))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Tower()


def tuned(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Save a random adapter; return ΔW of every module as PEFT computes it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Model(), LoraConfig(init_lora_weights=False, **settings))
        model.save_pretrained(folder, save_embedding_layers=False)
    return deltas_of(model)


def deltas_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: layer.get_delta_weight("default").detach().double()
        for name, layer in lora_layers(model)
    }


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            parts = [name.removeprefix("base_model.model.")]
            # A bare parameter's layer bears the name of the module that holds it.
            parts += [layer.parameter_name] if hasattr(layer, "parameter_name") else []
            yield ".".join(parts), layer


@pytest.mark.parametrize("variant", VARIANTS)
def test_norms_are_those_of_pefts_own_delta(variant: str, tmp_path: Path) -> None:
    deltas = tuned(tmp_path, **VARIANTS[variant])
    report = audit(tmp_path)
    assert {module.module for module in report.modules} == deltas.keys()
    for module in report.modules:
        delta = deltas[module.module]
        if module.expert is not None:
            delta = delta[module.expert]
        elif delta.dim() > 2:
            delta = delta.flatten(1)
        wanted = torch.linalg.svdvals(delta)[: module.rank].numpy()
        assert module.singular_values == pytest.approx(wanted, rel=1e-5), module.name
        assert module.frobenius_norm == pytest.approx(float(delta.norm()), rel=1e-5)


def source(folder: Path, *, rslora: bool = False) -> Path:
    """Write a PEFT adapter of planted spectra, with ranks 4 and 6 and an alpha_pattern."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for layer in range(3):
        for name, out, inputs in (("self_attn.q_proj", 32, 32), ("mlp.down_proj", 32, 96)):
            rank = 6 if name == "mlp.down_proj" else 4
            values = np.exp(-np.arange(rank) * (layer + 1) / 2.0)
            a, b = planted(values, out, inputs, seed=10 * layer + rank)
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
            tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": 4,
        "lora_alpha": 12,
        "use_rslora": rslora,
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {"layers.2.mlp.down_proj": 5},
        "target_modules": ["q_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def settings_of(folder: Path) -> dict[str, tuple[int, float]]:
    """Return rank and scaling of every module as PEFT creates them from the config in a folder."""
    model = PeftModel.from_pretrained(Model(), folder)
    return {
        name: (layer.r["default"], layer.scaling["default"]) for name, layer in lora_layers(model)
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_advised_patterns_give_pefts_layers_those_ranks_and_the_same_scaling(
    rslora: bool, tmp_path: Path
) -> None:
    before = settings_of(source(tmp_path / "source", rslora=rslora))
    plan = audit(tmp_path / "source", suggest=True, tol=0.2).plans[0]
    config = LoraConfig(target_modules=["q_proj", "down_proj"], **plan.peft)
    layers = dict(lora_layers(get_peft_model(Model(), config)))
    assert {name: layer.r["default"] for name, layer in layers.items()} == plan.ranks
    assert set(plan.ranks.values()) > {1}
    for name, layer in layers.items():
        assert layer.scaling["default"] == pytest.approx(before[name][1], rel=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_compressed_adapter_loads_in_peft(rslora: bool, tmp_path: Path) -> None:
    before = settings_of(source(tmp_path / "source", rslora=rslora))
    written = compress_file(tmp_path / "source", tmp_path / "small", tol=0.2)
    after = settings_of(tmp_path / "small")
    planned = {module.module: module.rank for module in written.report.modules}
    assert {name: rank for name, (rank, _) in after.items()} == planned
    for name, (_, scaling) in after.items():
        assert scaling == pytest.approx(before[name][1], rel=1e-12)
    old, new = (
        deltas_of(PeftModel.from_pretrained(Model(), tmp_path / name))
        for name in ("source", "small")
    )
    apart = sum(float((old[name] - new[name]).norm()) ** 2 for name in old)
    whole = sum(float(delta.norm()) ** 2 for delta in old.values())
    error = math.sqrt(apart / whole)
    assert error == pytest.approx(written.report.predicted_error, abs=1e-6)
    assert 0.05 < error <= 0.2


def test_stacked_experts_are_compressed_to_what_peft_loads(tmp_path: Path) -> None:
    old = tuned(tmp_path / "source", **VARIANTS["experts"])
    written = compress_file(tmp_path / "source", tmp_path / "small", rank=2)
    model = PeftModel.from_pretrained(Model(), tmp_path / "small")
    assert {layer.r["default"] for _, layer in lora_layers(model)} == {2}
    new = deltas_of(model)
    apart = sum(float((old[name] - new[name]).norm()) ** 2 for name in old)
    whole = sum(float(delta.norm()) ** 2 for delta in old.values())
    assert math.sqrt(apart / whole) == pytest.approx(written.report.predicted_error, abs=1e-6)


def test_a_pickle_is_measured_as_the_same_tensors_are(tmp_path: Path) -> None:
    tuned(tmp_path, **VARIANTS["patterns"])
    known = audit(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    found = {module.module: module for module in audit(tmp_path).modules}
    assert found == {module.module: module for module in known.modules}
