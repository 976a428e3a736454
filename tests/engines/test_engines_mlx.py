"""mlx-lm itself as the judge: what is written for it gives PEFT's logits there."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from engine import BaseFixture, family_row, make_adapter, make_base

from adapterkit import convert, diff

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

# mlx and torch each bring a runtime of their own: mlx-lm runs in a process that has no torch.
WORKER = """
import json, sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

base, adapter, prompts, out = map(Path, sys.argv[1:])
model, _ = load_model(base)
if adapter.name != "none":
    model = load_adapters(model, str(adapter))
asked = json.loads(prompts.read_text())
rows = [model(mx.array([prompt]))[0, -1].astype(mx.float32) for prompt in asked]
np.save(out, np.stack([np.array(row) for row in rows]))
"""
PROMPTS = [[5, 17, 40, 8], [3], [9, 9, 31, 2, 44, 7, 7]]
# float32 on both sides, other orders of summation.
TOLERANCE = 2e-4


def mlx_logits(base: Path, adapter: Path | None, folder: Path) -> np.ndarray:
    """Return the last logits of each prompt, (prompts, vocabulary)."""
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    arguments = [base, adapter or folder / "none", folder / "prompts.json", folder / "logits.npy"]
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "logits.npy")


def peft_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        rows = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return torch.stack(rows).float().numpy()


def for_mlx(fixture: BaseFixture) -> Path:
    """Add what mlx-lm looks for at the top of a config that transformers 5 has written."""
    path = fixture.hf / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    path.write_text(json.dumps(config))
    return fixture.hf


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_written_for_mlx_gives_the_logits_of_peft(
    family: str, dora: bool, tmp_path: Path
) -> None:
    base = make_base(family_row(family), tmp_path)
    tuned = make_adapter(base, tmp_path / "adapter", use_dora=dora)
    convert(tuned.path, tmp_path / "mlx", to="mlx", base=base.hf)
    folder = for_mlx(base)
    plain = mlx_logits(folder, None, tmp_path)
    ours = mlx_logits(folder, tmp_path / "mlx", tmp_path)
    expected = peft_logits(tuned.model)
    scale = np.abs(expected).max()
    assert np.abs(plain - peft_logits(base.model)).max() < TOLERANCE * scale
    assert np.abs(ours - expected).max() < TOLERANCE * scale
    assert np.abs(plain - expected).max() > 100 * TOLERANCE * scale


STACKS = {
    "granitemoe": ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"],
    # mlx-lm loads quantised checkpoints of it only: no logits to compare.
    "gpt-oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.mark.parametrize("family", STACKS)
def test_experts_that_only_llama_cpps_tensors_tell_stand_in_mlx_and_come_back(
    family: str, tmp_path: Path
) -> None:
    base = make_base(family_row(family), tmp_path)
    tuned = make_adapter(base, tmp_path / "adapter", target_parameters=STACKS[family])
    convert(tuned.path, tmp_path / "mlx", to="mlx", base=base.hf)
    convert(tmp_path / "mlx", tmp_path / "back", to="peft", base=base.hf)
    assert diff(tuned.path, tmp_path / "back", base=base.hf).equal
    if family == "gpt-oss":
        return
    folder = for_mlx(base)
    ours = mlx_logits(folder, tmp_path / "mlx", tmp_path)
    expected = peft_logits(tuned.model)
    scale = np.abs(expected).max()
    assert np.abs(ours - expected).max() < TOLERANCE * scale
    assert np.abs(peft_logits(base.model) - expected).max() > 100 * TOLERANCE * scale
