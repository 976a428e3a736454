"""What tests of dialects share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    import adapterkit

ROOT = Path(__file__).parents[2]
SOUND, BROKEN = ROOT / "fixtures/handwritten", ROOT / "fixtures/hostile/handwritten"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def delta(adapter: adapterkit.AdapterTensorSet) -> dict[str, np.ndarray]:
    return {
        pair.module: pair.scale * (pair.b.numpy().astype("f8") @ pair.a.numpy().astype("f8"))
        for pair in adapter.pairs()
    }
