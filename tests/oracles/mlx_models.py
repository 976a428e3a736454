"""Real mlx-lm's answers of a base and of an adapter on it, next-token logits of each prompt."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# mlx and torch each bring a runtime of their own: mlx-lm runs in a process that has no torch.
WORKER = """
import json, sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

base, adapter, prompts, out = map(Path, sys.argv[1:])
asked = json.loads(prompts.read_text())
for name in ("base", "tuned"):
    try:
        model, _ = load_model(base)
        if name == "tuned":
            model = load_adapters(model, str(adapter))
        rows = [model(mx.array([prompt]))[0, -1].astype(mx.float32) for prompt in asked]
    except Exception as error:
        (out / f"{name}.txt").write_text(f"{type(error).__name__}: {error}")
        break
    np.save(out / f"{name}.npy", np.stack([np.array(row) for row in rows]))
"""


@dataclass(frozen=True)
class Answers:
    """Logits (prompts, vocabulary) of the base and with the adapter, or what went wrong."""

    base: np.ndarray | str
    tuned: np.ndarray | str


def ask(base: Path, adapter: Path, prompts: Sequence[Sequence[int]], folder: Path) -> Answers:
    """Load both in mlx-lm and ask them."""
    (folder / "prompts.json").write_text(json.dumps([list(prompt) for prompt in prompts]))
    arguments = [base, adapter, folder / "prompts.json", folder]
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

    def answer(name: str) -> np.ndarray | str:
        said = folder / f"{name}.txt"
        if said.is_file():
            return said.read_text()
        found = folder / f"{name}.npy"
        return np.load(found).astype(np.float64) if found.is_file() else "the base did not load"

    return Answers(answer("base"), answer("tuned"))


def for_mlx(folder: Path) -> Path:
    """Add what mlx-lm looks for at the top of a config that transformers 5 has written."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    inner = [v for k, v in config.items() if isinstance(v, dict) and k.endswith("config")]
    for part in (config, *inner):
        rope = part.get("rope_parameters") or {}
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                part.setdefault(name, rope[name])
        heads, latent = part.get("num_attention_heads"), "kv_lora_rank" in part
        if heads and "hidden_size" in part and not part.get("head_dim") and not latent:
            part["head_dim"] = part["hidden_size"] // heads
    config.setdefault("rope_theta", 10000.0)
    path.write_text(json.dumps(config))
    return folder
