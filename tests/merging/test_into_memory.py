"""Merging into a base takes a few blocks of memory, whatever the size of a tensor."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapterkit.containers.gguf import uint32, write_gguf
from adapterkit.dtype import DType
from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

ROWS, WIDTH = 160_000, 512
SIZE = ROWS * WIDTH * 2
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "tie_word_embeddings": False,
}
SCRIPT = """
import resource, sys
from pathlib import Path
from adapterkit import merge_into

adapter, base, merged, kind = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = merge_into([adapter], base, merged, jobs=1, gguf_type=kind or None)
assert report.min_survival > 0.95, report
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def directory(folder: Path) -> Path:
    """Write a model of one table, whose bytes are a hole in the file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    span = {"dtype": "BF16", "shape": [ROWS, WIDTH], "data_offsets": [0, SIZE]}
    header = json.dumps({"model.embed_tokens.weight": span}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + SIZE)
    return folder


def gguf(path: Path) -> Path:
    """Write the same as a GGUF."""
    hole = path.with_suffix(".hole")
    with hole.open("wb") as file:
        file.truncate(SIZE)
    table = LazyTensor(DType.BF16, (ROWS, WIDTH), FileSlice(hole, 0, SIZE))
    numbers = {"block_count": 1, "embedding_length": WIDTH, "attention.head_count": 8}
    metadata = {f"llama.{key}": uint32(value) for key, value in numbers.items()}
    output = LazyTensor.of(np.zeros((1, WIDTH), np.float32))
    tensors = {"token_embd.weight": table, "output.weight": output}
    write_gguf(path, {"general.architecture": "llama", **metadata}, tensors)
    return path


@pytest.mark.parametrize("kind", ["", "bf16", "q8_0", "q6_k"])
def test_memory_is_a_block_and_not_a_tensor(kind: str, tmp_path: Path) -> None:
    """A table of 160 MB is merged in a process that may hold less than half of it on top."""
    base = gguf(tmp_path / "base.gguf") if kind else directory(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    factors = {
        prefix + "A": np.ones((1, ROWS), np.float32),
        prefix + "B": np.linspace(0.5, 1, WIDTH, dtype=np.float32)[:, None],
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged = tmp_path / ("merged.gguf" if kind else "merged")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(adapter), str(base), str(merged), kind],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60
