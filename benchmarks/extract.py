"""Extraction: a billion parameters, and one module against a full decomposition in torch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from subprocess import check_call

from checkpoints import INDEX, Shape, adapter, checkpoint
from measure import alternate

BUILD = Path("build/bench/extract")
KIT = [sys.executable, "-m", "adapterkit"]
# As mergekit does it: the difference in float32, all of its singular values.
PEER = """
import sys
import torch
from safetensors.torch import load_file

base, tuned = (load_file(f"{folder}/model-00001-of-00001.safetensors") for folder in sys.argv[1:])
(name,) = (name for name in base if not torch.equal(base[name], tuned[name]))
left, values, right = torch.linalg.svd((tuned[name] - base[name]).float(), full_matrices=False)
root = values[:16].sqrt()
left, right = left[:, :16] * root, root[:, None] * right[:16]
"""


def made(name: str, shape: Shape, shards: int) -> list[str]:
    """Make a base, an adapter and the merged model; return the command that extracts it again."""
    base, lora, tuned, out = (BUILD / f"{name}-{part}" for part in ("base", "lora", "tuned", "out"))
    checkpoint(base, shape, shards=shards)
    adapter(lora, shape)
    if not (tuned / INDEX).is_file():
        check_call([*KIT, "merge", lora, "--into", base, "-o", tuned])
    return [*KIT, "extract", "--base", str(base), "--tuned", str(tuned), "-o", str(out), "--force"]


def main() -> None:
    """Print seconds and MiB of whole processes, medians."""
    BUILD.mkdir(parents=True, exist_ok=True)
    one = made("one", Shape(layers=1, ffn=64, vocabulary=64, only=("self_attn.q_proj",)), 1)
    peer = [sys.executable, "-c", PEER, *(str(BUILD / f"one-{part}") for part in ("base", "tuned"))]
    for title, commands in (
        ("one module of 2048 x 2048, bf16, r=16", {"ours": one, "peer": peer}),
        ("1.04 billion parameters, bf16, r=16 on 112 modules", {"ours": made("1b", Shape(), 4)}),
    ):
        print(title)
        for name, run in alternate(commands, 3).items():
            print(f"  {name:6} {run.wall:7.3f} s wall {run.cpu:7.3f} s CPU {run.peak:7.0f} MiB")
    shutil.rmtree(BUILD / "1b-out", ignore_errors=True)


if __name__ == "__main__":
    main()
