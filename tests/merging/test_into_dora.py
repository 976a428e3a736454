"""DoRA finds its rows where the base stacks them: fused q, k and v, and experts one by one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoint_bases import EFFECT, EQUAL, loaded, trained
from engine import (
    BaseFixture,
    engine_logprobs,
    family_row,
    logprobs,
    make_base,
    max_kl,
    prompts_for,
)
from fused_checkpoints import QKV, rewritten
from safetensors.numpy import save_file

from adapterkit import merge_into
from adapterkit.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("parts", ["qkv", "qv", "k"])
@pytest.mark.parametrize("name", ["llama", "llama-wide-heads"])
def test_parts_of_a_fused_tensor_keep_their_magnitudes(
    name: str, parts: str, tmp_path: Path
) -> None:
    base = make_base(family_row(name), tmp_path)
    gguf = rewritten(base, tmp_path / "fused.gguf", QKV)
    targets = [f"{part}_proj" for part in parts]
    tuned = trained(base, tmp_path / "adapter", target_modules=targets, use_dora=True)
    merge_into([tmp_path / "adapter"], gguf, tmp_path / "merged.gguf")
    prompts = prompts_for(base)[-4:]
    wanted = logprobs(tuned, prompts)
    assert max_kl(logprobs(base.model, prompts), wanted) > EFFECT / 10
    assert max_kl(wanted, engine_logprobs(tmp_path / "merged.gguf", prompts)) < base.tolerance


def test_rows_without_a_magnitude_are_a_plain_sum(tmp_path: Path) -> None:
    """One adapter with DoRA on q and one without on v, in the one fused tensor."""
    base = make_base(family_row("llama"), tmp_path)
    gguf = rewritten(base, tmp_path / "fused.gguf", QKV)
    trained(base, tmp_path / "q", target_modules=["q_proj"], use_dora=True)
    trained(base, tmp_path / "v", target_modules=["v_proj"], seed=2)
    both = [tmp_path / "q", tmp_path / "v"]
    merge_into(both, gguf, tmp_path / "fused-merged.gguf")
    merge_into(both, base.gguf, tmp_path / "merged.gguf")
    prompts = prompts_for(base)[-4:]
    apart = engine_logprobs(tmp_path / "merged.gguf", prompts)
    assert max_kl(apart, engine_logprobs(tmp_path / "fused-merged.gguf", prompts)) < EQUAL


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("mixtral"), tmp_path_factory.mktemp("mixtral"))


EXPERT = "model.layers.0.block_sparse_moe.experts"
RANK, ALPHA = 4, 8


def expert_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Write DoRA on some matrices of some experts, as PEFT wrote it for a list of experts."""
    random = np.random.default_rng(3)
    tensors: dict[str, Any] = {}
    for module, (rows, columns) in shapes.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((RANK, columns))
        tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((rows, RANK)) * 0.3
        tensors[f"{prefix}.lora_magnitude_vector"] = 0.5 + random.random(rows)
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    return tensors


def dense(tensors: Mapping[str, Any], module: str, weight: Any) -> Any:
    """Return m / ‖W + ΔW‖ · (W + ΔW) in float64."""
    prefix = f"base_model.model.{module}"
    a, b = (tensors[f"{prefix}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    moved = weight.double().numpy() + ALPHA / RANK * b @ a
    norms = np.linalg.norm(moved, axis=1)
    return moved * (tensors[f"{prefix}.lora_magnitude_vector"] / norms)[:, None]


@pytest.mark.parametrize("target", ["merged.gguf", "merged"])
def test_experts_keep_theirs(target: str, mixtral: BaseFixture, tmp_path: Path) -> None:
    model = loaded(mixtral.hf)
    experts = model.model.layers[0].mlp.experts
    ffn, hidden = experts.gate_up_proj.shape[1] // 2, experts.gate_up_proj.shape[2]
    up, down = (ffn, hidden), (hidden, ffn)
    chosen = {"0.w1": up, "2.w1": up, "1.w2": down, "0.w3": up, "3.w2": down}
    shapes = {f"{EXPERT}.{name}": shape for name, shape in chosen.items()}
    tensors = expert_adapter(tmp_path / "adapter", shapes)
    with torch.no_grad():
        for name in chosen:
            expert, kind = int(name[0]), name[2:]
            # transformers stacks w1 over w3.
            stack = experts.down_proj if kind == "w2" else experts.gate_up_proj
            rows = slice(ffn, None) if kind == "w3" else slice(None, None if kind == "w2" else ffn)
            part = stack[expert, rows]
            part.copy_(torch.from_numpy(dense(tensors, f"{EXPERT}.{name}", part)))
    base = mixtral.gguf if target.endswith(".gguf") else mixtral.hf
    report = merge_into([tmp_path / "adapter"], base, tmp_path / target)
    prompts = prompts_for(mixtral)[-4:]
    wanted = logprobs(model, prompts)
    assert max_kl(logprobs(mixtral.model, prompts), wanted) > EFFECT
    merged = tmp_path / target
    found = (
        engine_logprobs(merged, prompts) if merged.is_file() else logprobs(loaded(merged), prompts)
    )
    assert max_kl(wanted, found) < mixtral.tolerance
    used = {module for tensor in report.tensors for module in tensor.modules}
    assert used == shapes.keys()


def test_a_magnitude_of_another_size_is_named(mixtral: BaseFixture, tmp_path: Path) -> None:
    tensors = expert_adapter(tmp_path / "adapter", {f"{EXPERT}.0.w1": (96, 64)})
    name = f"base_model.model.{EXPERT}.0.w1.lora_magnitude_vector"
    tensors[name] = tensors[name][:-1]
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises((UnsupportedError, FormatError), match=r"experts\.0\.w1"):
        merge_into([tmp_path / "adapter"], mixtral.gguf, tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()
