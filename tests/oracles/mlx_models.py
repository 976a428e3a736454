"""Real mlx-lm's answers of a base and of an adapter on it, next-token logits of each prompt."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    except (Exception, SystemExit) as error:
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


def for_mlx(folder: Path, known: Any) -> Path:
    """Write into a base's config.json what mlx-lm looks for and transformers 5 spells otherwise.

    Args:
        folder: the base; its config.json is changed.
        known: the transformers config, which answers to the names of hub files too.
    """
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    inner = [
        (name, v) for name, v in config.items() if isinstance(v, dict) and hasattr(known, name)
    ]
    for name, part in [("", config), *inner]:
        owner = getattr(known, name) if name else known
        for field in fields_of(str(part.get("model_type"))) if hasattr(owner, "to_dict") else ():
            if part.get(field) is not None:
                continue
            rope = getattr(owner, "rope_parameters", None) or {}
            value = rope.get(field, getattr(owner, field, ...))
            if field == "rope_scaling":
                value = None  # of a tiny model, whatever transformers makes of it
            if field == "head_dim" and not isinstance(value, int) and "hidden_size" in part:
                value = part["hidden_size"] // part["num_attention_heads"]
            if value is not ...:
                part[field] = value
    config.setdefault("rope_theta", 10000.0)
    path.write_text(json.dumps(config, default=str))
    return folder


def fields_of(kind: str) -> tuple[str, ...]:
    """Return the fields of the config that mlx-lm has for a model type; nothing is imported."""
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "models" / f"{kind}.py"
    tree = ast.parse(source.read_text()) if source.is_file() else ast.Module([], [])
    arguments = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ModelArgs")
    body = [node for each in arguments for node in each.body]
    return tuple(
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
